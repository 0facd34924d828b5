"""The types of the files that `eval_report` writes and other steps read.

`EvalReport` is report.json, `Verdict` is verdict.json, a list of `Finding` is diagnosis.json. The
field names are the keys of these files, but for two aliases. A field that was not set is not
written, so that an optional key stays absent. Unknown keys are ignored.
No torch and no scipy: the asset checks import this module.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from ft_assets.artifacts.documents import read_document
from ft_assets.data.mixing import SourceLine
from ft_assets.metrics import higher_is_better

Status = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class Part(BaseModel):
    """A frozen part of a report; `to_dict` and `to_json` keep the layout of the files."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the part as plain data, in the order of its fields."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    def to_json(self) -> str:
        """Return the text of a JSON file with this part."""
        return to_json(self.to_dict())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a JSON file.

        Raises ArtifactError if it is missing, damaged, or of another version.
        """
        return read_document(path, cls, "materialize eval_report again")


def to_json(data: Any) -> str:
    """Return plain data as the text of a JSON file of the report."""
    return json.dumps(data, indent=1, ensure_ascii=False)


class Estimate(Part):
    """A mean difference with its confidence interval; positive means better."""

    mean: float
    low: float
    high: float


class Difference(Estimate):
    """The paired difference of two candidates in one metric, over the same rows.

    p is two-sided; `test` names the test. detectable: the smallest difference that n rows would
    find with 80 % power at the report's confidence, None if the rows do not differ. rows_needed:
    the n at which a difference of the observed size would be found with that power. graded: the
    scores are not all 0 or 1. groups: the groups of the n rows; correlation: the one within groups,
    None if each row is a group; effective_n: the independent rows that they are worth.
    """

    wins: int
    losses: int
    ties: int
    n: int
    test: Literal["McNemar", "permutation"]
    p: float
    detectable: float | None
    rows_needed: int | None
    graded: bool | None = None
    groups: int | None = None
    correlation: float | None = None
    effective_n: float | None = None

    @property
    def is_graded(self) -> bool:
        """True if the scores are not all 0 or 1."""
        return self.test == "permutation" if self.graded is None else self.graded

    @property
    def independent(self) -> int:
        """The number of groups, which minimums count; of an old report the rows."""
        return self.n if self.groups is None else self.groups

    def rows(self) -> str:
        """Return the number of rows as text, with groups where they are fewer."""
        if self.independent == self.n:
            return f"n={self.n}"
        return (
            f"n={self.n} in {self.groups} groups "
            f"(correlation {self.correlation:.2f}, effective n {self.effective_n:.0f})"
        )

    def describe(self, metric: str, rival: str = "base") -> str:
        """Return the difference as text, e.g. `exact +0.359 against base [+0.250, +0.484], …`."""
        interval = f"[{self.low:+.3f}, {self.high:+.3f}]"
        return (
            f"{metric} {self.mean:+.3f} against {rival} {interval}, p {self.p:.2g}, {self.rows()}"
        )


class Agreement(Part):
    """Krippendorff's ordinal alpha with its interval: 1 is complete agreement, 0 that of chance.

    pairs: the compared pairs of answers. prompts: the independent groups of prompts.
    """

    alpha: float
    low: float
    high: float
    pairs: int
    prompts: int

    def describe(self) -> str:
        """Return the agreement as text."""
        return (
            f"alpha {self.alpha:.2f} [{self.low:.2f}, {self.high:.2f}], {self.pairs} pairs of "
            f"{self.prompts} prompts"
        )


class Leaning(Part):
    """The pairs where the judge leans one way, and the share where people do too."""

    pairs: int
    agree: float | None


class JudgeCalibration(Part):
    """The judge against people. bar: the least alpha. asked: pairs, each in both orders.

    first_twice, second_twice: pairs of which the judge preferred the same place in both orders.
    longer, shorter: the pairs of which it preferred the longer, the shorter answer.
    """

    bar: float
    with_people: Agreement | None
    among_people: Agreement | None
    asked: int
    first_twice: int
    second_twice: int
    longer: Leaning
    shorter: Leaning

    @property
    def agrees(self) -> bool:
        """True if alpha reaches the bar, and is proven to be above that of chance."""
        found = self.with_people
        return found is not None and found.alpha >= self.bar and found.low > 0

    def describe(self) -> str:
        """Return the calibration as text."""
        if self.with_people is None:
            return "people judged no pair of different answers that the judge compared"
        text = f"judge and people: {self.with_people.describe()}; at least {self.bar:g} is needed"
        if self.among_people:
            text += f"; people among themselves: {self.among_people.describe()}"
        text += (
            f"; of {self.asked} pairs in both orders it preferred the first place in both "
            f"{self.first_twice} times, the second {self.second_twice} times"
        )
        for name, leaning in (("longer", self.longer), ("shorter", self.shorter)):
            if leaning.agree is not None:
                text += (
                    f"; where it prefers the {name} answer ({leaning.pairs} pairs), people agree "
                    f"in {leaning.agree:.0%}"
                )
        return text


Scores = dict[str, float]  # the mean of each metric
Differences = dict[str, Difference]  # by metric
Comparisons = dict[str, dict[str, Differences]]  # by candidate, then by its rival


class Retention(Part):
    """The scores of the general prompts. `answered` of `rows` were generated; all have a loss.

    groups: the number of groups of the rows.
    """

    metric: str
    rows: int
    answered: int
    scores: dict[str, Scores]
    comparisons: Comparisons
    groups: int | None = None


class Harness(Part):
    """The scores of lm-evaluation-harness, by "task metric"; empty without `lm_eval`."""

    scores: dict[str, Scores]
    comparisons: Comparisons


class AdapterProof(Part):
    """The proof that an adapter acts: its targets, the smallest ‖ΔW‖, the largest logit change.

    `changed` counts the tensors that differ from the base's; only full fine-tuning has it.
    """

    targets: int
    changed: int | None = None
    smallest_update: float
    logit_change: float


class OwnTemplate(Part):
    """The base's mean loss under its own template and under the configured one, nats per token."""

    loss: float
    loss_as_configured: float
    rows: Literal["general", "held-out"]


class Proofs(Part):
    """The proofs behind the scores. `template_mismatches` are ids of rows; [] if all match."""

    adapters: dict[str, AdapterProof]
    template_mismatches: list[str]
    own_template: OwnTemplate | None = None
    own_template_refuses: str | None = None


class Diversity(Part):
    """The spread of the training rows: shares in [0, 1], the entropy of the answers in bits."""

    rows: int
    distinct_prompts: float
    answer_entropy_bits: float
    top_answer: float


class ValidationLoss(Part):
    """One measurement of SFT's validation loss, in nats per token."""

    epoch: float
    step: int
    validation_loss: float
    kept: bool | None = None


class Evidence(Part):
    """Facts that the diagnosis needs besides the scores.

    validation: up to the kept weights; kept_is_last: no later one was measured. steps: SFT's
    optimizer steps. own_rehearsal_rows: trained rows that are the base's own answers.
    sources: what each entry of the data gave to the train side.
    """

    train: Diversity
    train_loss: Scores
    validation: list[ValidationLoss]
    vocabulary: int
    general_stop_rate: float | None
    labels: int
    kept_is_last: bool | None = None
    steps: int | None = None
    sources: list[SourceLine] = []
    own_rehearsal_rows: int | None = None


class ExampleSet(Part):
    """A set of training rows as examples; score: None if the base cannot be asked with it."""

    rows: list[str]
    score: float | None


class FewShotChoice(Part):
    """How `data.few_shot: auto` chose among the sets `tried`, by the mean `metric` of `rows` rows.

    The rows are validation rows, or training rows; chosen: the place of the best set.
    """

    chosen: int
    metric: str
    rows: int
    tried: list[ExampleSet]

    def numbers(self) -> dict[str, float]:
        """Return the choice as numbers of a progress line."""
        scores = {f"set {place + 1}": one.score for place, one in enumerate(self.tried)}
        known = {name: round(score, 4) for name, score in scores.items() if score is not None}
        return {"chosen": self.chosen + 1, **known}

    def describe(self) -> str:
        """Return the choice as a sentence."""
        best = self.tried[self.chosen]
        others = [
            "not asked" if one.score is None else f"{one.score:.3f}"
            for place, one in enumerate(self.tried)
            if place != self.chosen
        ]
        return (
            f"The prompted base has {len(best.rows)} training rows as examples "
            f"({', '.join(best.rows)}): the best of {len(self.tried)} sets on {self.rows} rows "
            f"that are not held out, {self.metric} {best.score:.3f}; "
            f"the others: {', '.join(others)}."
        )


class SeedSpread(Estimate):
    """The gain over the base in the gate's metric, over trainings with several seeds.

    gains: of each seed, the merged one first. deviation: the standard deviation between them. The
    interval is that of the mean over rows and seeds (verdict/seeds.py).
    """

    gains: list[float]
    deviation: float

    def describe(self, metric: str) -> str:
        """Return the spread as text."""
        each = ", ".join(f"{gain:+.3f}" for gain in self.gains)
        return (
            f"{metric} {self.mean:+.3f} against base [{self.low:+.3f}, {self.high:+.3f}] over "
            f"{len(self.gains)} seeds ({each}; deviation {self.deviation:.3f})"
        )


class Form(Part):
    """The candidates against rivals that have the form of an answer alone, in the gate's metric.

    heldout, train: {candidate: {rival: difference}} on held-out rows and on rows that the candidate
    was trained on. not_measured: why there is no rival, None if there is one.
    """

    heldout: dict[str, Differences]
    train: dict[str, Differences]
    not_measured: str | None = None


class RivalCost(Part):
    """What the answers of a rival cost.

    model: the endpoint's model, or the name of a base model. per_thousand: the price of a thousand
    answers, in the currency of the configured prices; None if prices or counts of tokens are not
    known. seconds, seconds_p95: the median and the 95th percentile of the time of an answer; None
    if the graph had them all.
    """

    model: str
    per_thousand: float | None
    seconds: float | None
    seconds_p95: float | None

    def describe(self) -> str:
        """Return price and latency as text."""
        price = "price not known" if self.per_thousand is None else f"{self.per_thousand:.4g}"
        time = "time not measured" if self.seconds is None else f"{self.seconds:.2f} s an answer"
        return f"{price} a thousand answers, {time}"


class Retrieved(Part):
    """What a rival that retrieves found for the held-out rows, as counts of rows.

    without_hits: no chunk shares a word with the question. answer_found: the reference stands in a
    chunk that was put before the question. answer_there: in any chunk. copied: question and
    reference stand in one chunk: the documents have the row itself.
    """

    documents: int
    chunks: int
    rows: int
    without_hits: int
    answer_found: int
    answer_there: int
    copied: int

    def numbers(self) -> dict[str, int]:
        """Return the counts by name."""
        return dict(self)


class Search(Part):
    """A question, and the chunks that were put before it: file and line, score, and text."""

    question: str
    hits: list[tuple[str, float, str]]


class RivalReport(Part):
    """A rival on the same held-out rows.

    scores: the mean of each metric of an answer. interval: of the gate's metric. comparisons: of
    each candidate with the rival, in the gate's metric; positive means that the candidate is
    better. must_beat: a PASS needs proof that it is. retrieved, searches: of a rival with
    documents, with the first rows.
    """

    cost: RivalCost
    must_beat: bool
    scores: Scores
    interval: tuple[float, float]
    comparisons: Differences
    retrieved: Retrieved | None = None
    searches: list[Search] = Field(default=[])


class EvalReport(Part):
    """report.json: the numbers that the verdict, the pictures and the pages are made of.

    confidence: of the intervals and tests; gate_confidence: the one that the gate asked for, which
    repeated verdicts on the same rows raise (verdict_number; verdict/spending.py). heldout_groups:
    the number of groups of the held-out rows.
    scores: {candidate: {metric: mean}}. intervals: of each candidate's gate metric. chance:
    {candidate: its scores against those of shuffled references}. bound_to: the versions of what was
    judged. lower_is_better: of a user's own metrics those that are a loss. calibration: that of the
    judge, None without people's judgements. rivals: by name. rewards: of RL, metrics with their
    weights.
    """

    metric: str
    metrics: list[str]
    heldout_rows: int
    confidence: float
    scores: dict[str, Scores]
    intervals: dict[str, tuple[float, float]]
    comparisons: Comparisons
    retention: Retention | None
    chance: Differences
    harness: Harness
    proofs: Proofs
    evidence: Evidence
    bound_to: dict[str, str]
    lower_is_better: list[str] | None = None
    heldout_groups: int | None = None
    gate_confidence: float | None = None
    verdict_number: int | None = None
    form: Form | None = None
    few_shot: FewShotChoice | None = None
    seeds: dict[str, SeedSpread] | None = None
    calibration: JudgeCalibration | None = None
    rivals: dict[str, RivalReport] | None = None
    rewards: dict[str, float] | None = None

    def higher_is_better(self, metric: str) -> bool:
        """Return False if a metric of this report is better when it is lower."""
        return higher_is_better(metric) and metric not in (self.lower_is_better or ())


class Judgement(Part):
    """The status of one candidate, and the reasons for it."""

    status: Status
    reasons: list[str]


class Verdict(Part):
    """verdict.json. `candidate` is merged (None: nothing is); the reasons are those of
    `reported_candidate`, which is set in any case. dpo, rl: why it was taken or not; None without.

    `override` is the written reason of `gate.override`, set only if it replaced a PASS.
    """

    status: Status
    candidate: str | None
    reported_candidate: str = Field(validation_alias="speaker", serialization_alias="speaker")
    reasons: list[str]
    dpo: str | None
    candidates: dict[str, Judgement]
    bound_to: dict[str, str]
    override: str | None = None
    rl: str | None = None

    @property
    def merged_candidate(self) -> str:
        """The candidate to merge, of a verdict that passed the gate."""
        assert self.candidate is not None, "a verdict that passed the gate has a candidate"
        return self.candidate


class Finding(Part):
    """A suspected cause of a verdict that is not a PASS, with its evidence and advice."""

    cause: str
    evidence: list[str]
    advice: str = Field(validation_alias="try", serialization_alias="try")


def findings_json(findings: Sequence[Finding]) -> str:
    """Return the text of diagnosis.json."""
    return to_json([finding.to_dict() for finding in findings])
