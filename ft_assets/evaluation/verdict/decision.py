"""The verdict: PASS, FAIL or INCONCLUSIVE, a pure function of the report's numbers and the gate.

The asset checks, the report and `merged_model` (by gate.py) call this module; nothing else decides.
It fails closed: what the rows cannot decide is INCONCLUSIVE, never PASS.
Not here: what the verdict is bound to (gate.py), why it is not a PASS (diagnosis.py).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from ft_assets.config import ADAPTERS, GateSettings
from ft_assets.evaluation.report_model import (
    Difference,
    Differences,
    EvalReport,
    Judgement,
    Scores,
    Status,
    Verdict,
)
from ft_assets.evaluation.verdict.holm import holm

PASS: Literal["PASS"] = "PASS"
FAIL: Literal["FAIL"] = "FAIL"
INCONCLUSIVE: Literal["INCONCLUSIVE"] = "INCONCLUSIVE"
MANY_TIMES = 50  # the rows there are: more of them are no advice


@dataclass(frozen=True)
class Reasons:
    """The findings of one rule: what fails, what the rows cannot decide, what is proven."""

    fails: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    proven: list[str] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Iterable["Reasons"]) -> Self:
        """Return the findings of several rules as one."""
        result = cls()
        for part in parts:
            result.fails.extend(part.fails)
            result.unsure.extend(part.unsure)
            result.proven.extend(part.proven)
        return result

    @property
    def passed(self) -> bool:
        """True if nothing fails and nothing is undecided."""
        return not self.fails and not self.unsure

    @property
    def decisive(self) -> list[str]:
        """The reasons of the status: failures, else what is undecided, else what is proven."""
        return self.fails or self.unsure or self.proven

    def judgement(self) -> Judgement:
        """Return the status that these findings lead to, with its reasons."""
        status: Status = FAIL if self.fails else INCONCLUSIVE if self.unsure else PASS
        return Judgement(status=status, reasons=self.decisive)


def beats(entry: Difference, confidence: float, p: float | None = None) -> bool:
    """Return True if a difference is above zero by its test, and its interval is not below it.

    p: replaces the difference's own p-value, e.g. by Holm's.
    """
    # The test decides; an interval that ends at zero does not contradict it.
    significant = (entry.p if p is None else p) < 1 - confidence
    return entry.mean > 0 and entry.low >= 0 and significant


def worse(entry: Difference, confidence: float, p: float | None = None) -> bool:
    """Return True if a difference is below zero by its test, and its interval is not above it."""
    significant = (entry.p if p is None else p) < 1 - confidence
    return entry.mean < 0 and entry.high <= 0 and significant


def not_worse(entry: Difference, margin: float) -> bool:
    """Return True if a difference is proven to be above −margin."""
    return entry.low > -margin


def judge(
    candidate: str, report: EvalReport, gate: GateSettings, adjusted: Mapping[str, float]
) -> Judgement:
    """Judge one candidate against the base; `adjusted` are its Holm p-values by metric."""
    metric, comparisons = report.metric, report.comparisons[candidate]
    found = Reasons.joined(
        [
            _integrity(report),
            calibration(report, gate),
            quality(comparisons["base"], metric, gate, adjusted, report.confidence),
            _chance(report.chance.get(candidate), metric, report.confidence),
            _prompting(comparisons.get("few_shot", {}).get(metric), report, gate),
            _rivals(candidate, report, gate),
            _hacked_reward(candidate, report),
            _form(candidate, report, gate),
            _seeds(candidate, report, gate),
            _stopping(candidate, report.scores, gate),
            _behaviour(candidate, report.scores, gate, "held-out"),
            forgetting(candidate, report, gate),
            _enough_rows(report, gate),
        ]
    )
    return found.judgement()


def _integrity(report: EvalReport) -> Reasons:
    mismatches = report.proofs.template_mismatches
    if not mismatches:
        return Reasons()
    return Reasons(
        fails=[
            f"template mismatch: {len(mismatches)} rows were tokenized with another template, "
            f"e.g. {mismatches[0]}"
        ]
    )


def calibration(report: EvalReport, gate: GateSettings) -> Reasons:
    """Require that a judge whose scores a PASS needs agrees with people, if people judged."""
    if "judge" not in goals(report.metric, gate):
        return Reasons()
    found = report.calibration
    if found is None:
        return Reasons(proven=["warning: the judge is not calibrated: no person judged (review)"])
    if not found.agrees:
        return Reasons(unsure=[f"the judge does not agree with people: {found.describe()}"])
    return Reasons(proven=[found.describe()])


def _enough_rows(report: EvalReport, gate: GateSettings) -> Reasons:
    rows, groups = report.heldout_rows, report.heldout_groups
    least = gate.min_heldout_rows
    if rows < least:
        return Reasons(unsure=[f"too few held-out rows: {rows} < {least}"])
    if groups is not None and groups < least:
        text = f"too few groups of held-out rows: {groups} < {least} ({rows} rows)"
        return Reasons(unsure=[text])
    return Reasons()


def goals(metric: str, gate: GateSettings) -> Mapping[str, Literal["better"] | float]:
    """Return the goals of a PASS: {metric: "better" or a margin}."""
    return gate.metrics or {metric: "better"}


def adjusted_p(
    against: Mapping[str, Differences], metric: str, gate: GateSettings
) -> dict[str, dict[str, float]]:
    """Return Holm's p-values as {candidate: {metric: p}}.

    The correction is over all chances of a false PASS. If one better metric is enough, these are
    all candidates and all such metrics. If all must be better, a false PASS needs each of them
    (intersection–union test), so each metric is corrected over the candidates alone.
    against: {candidate: its differences to the base}.
    """
    wanted = [name for name, goal in goals(metric, gate).items() if goal == "better"]
    families = [wanted] if gate.better == "any" else [[name] for name in wanted]
    adjusted: dict[str, float] = {}
    for family in families:
        adjusted |= holm(
            {
                f"{candidate} {name}": entries[name].p
                for candidate, entries in against.items()
                for name in family
            }
        )
    return {
        candidate: {name: adjusted[f"{candidate} {name}"] for name in wanted}
        for candidate in against
    }


def quality(
    against: Differences,
    metric: str,
    gate: GateSettings,
    adjusted: Mapping[str, float],
    confidence: float | None = None,
) -> Reasons:
    """Judge the metrics that a PASS needs.

    Of several metrics that must be better all must be, by Holm's p-values; with `gate.better: any`
    one is enough if none is worse. Each margin must be kept (intersection–union test: no correction
    is needed). confidence: of the intervals in `against`, by default the gate's.
    """
    wanted = goals(metric, gate)
    return Reasons.joined(
        [
            _improvement(against, confidence or gate.confidence, adjusted, gate.better == "all"),
            margins(against, metric, gate),
            *[_enough_graded(name, against[name], gate) for name in wanted],
        ]
    )


def margins(
    against: Differences, metric: str, gate: GateSettings, rival: str = "the base"
) -> Reasons:
    """Judge the margins of `gate.metrics` against the base, or against another named rival."""
    return Reasons.joined(
        _margin(name, against[name], goal, rival)
        for name, goal in goals(metric, gate).items()
        if goal != "better"
    )


def _enough_graded(metric: str, entry: Difference, gate: GateSettings) -> Reasons:
    """Require enough groups for scores between 0 and 1.

    Rows of a kind that makes up a tenth are missing from 36 groups with a chance of 2.3 %, from 20
    with 12 %. What they would change cannot be seen in the others.
    """
    least = gate.min_graded_rows
    if not entry.is_graded or entry.independent >= least:
        return Reasons()
    text = f"too few held-out rows for the graded metric {metric}: {entry.rows()}, at least {least}"
    return Reasons(unsure=[text])


def _improvement(
    against: Differences, confidence: float, adjusted: Mapping[str, float], all_of_them: bool
) -> Reasons:
    found = Reasons()
    for metric, p in adjusted.items():
        text = against[metric].describe(metric)
        if beats(against[metric], confidence, p):
            found.proven.append(f"better than the base: {text}")
        elif worse(against[metric], confidence, p):
            found.fails.append(f"worse than the base: {text}")
        else:
            more = _how_many(against[metric])
            found.unsure.append(f"cannot tell it from the base: {text}{more}")
    if found.proven and not all_of_them:
        found.unsure.clear()
    return found


def _margin(metric: str, entry: Difference, margin: float, rival: str) -> Reasons:
    text = entry.describe(metric, rival)
    if entry.high < -margin:
        return Reasons(fails=[f"worse than {rival} by more than {margin}: {text}"])
    if not not_worse(entry, margin):
        text = f"may be worse than {rival} by more than {margin}: {text}"
        return Reasons(unsure=[f"{text}{_rows_for(entry, margin)}"])
    return Reasons(proven=[f"not worse than {rival} by {margin}: {text}"])


def _how_many(entry: Difference) -> str:
    seen = ""
    if entry.detectable:
        seen = f"; {entry.n} rows find a difference of {entry.detectable:.3f} four times in five"
    if not entry.rows_needed or entry.rows_needed <= entry.n:
        return seen
    return f"{seen}; about {entry.rows_needed} held-out rows would decide one of this size"


def _rows_for(entry: Difference, margin: float) -> str:
    """Describe how many rows would narrow the interval enough to keep a margin, if any number."""
    room, reach = entry.mean + margin, entry.mean - entry.low
    if room <= 0 or reach <= 0:
        return ""
    # The interval must end before the margin four times in five: z(0.975) + z(0.8) = 2.80.
    rows = math.ceil(entry.n * (reach / room * 2.80 / 1.96) ** 2)
    if rows > MANY_TIMES * entry.n:
        return "; the mean is too close to it for more rows to help"
    return f"; about {rows} rows would decide if the mean stays"


def _chance(entry: Difference | None, metric: str, confidence: float) -> Reasons:
    if entry is None or beats(entry, confidence):
        return Reasons()
    text = entry.describe(metric, "shuffled references")
    if worse(entry, confidence):
        return Reasons(fails=[f"the answers fit other rows' references better: {text}"])
    return Reasons(unsure=[f"cannot tell the answers from answers to other rows: {text}"])


def _form(candidate: str, report: EvalReport, gate: GateSettings) -> Reasons:
    """Judge the gain against rivals that have the form of an answer alone.

    On trained rows the candidate must be better than they are as well: a model that did not learn
    its own rows has no content to be better by.
    """
    form, metric = report.form, report.metric
    if form is None or "better" not in goals(metric, gate).values():
        return Reasons()
    found = Reasons(proven=[f"form and content are not told apart: {form.not_measured}"])
    if form.not_measured is None:
        found.proven.clear()
    gains = beats(report.comparisons[candidate]["base"][metric], report.confidence)
    for rival, entry in form.heldout.get(candidate, {}).items():
        text = entry.describe(metric, rival)
        if beats(entry, report.confidence):
            found.proven.append(f"more than the form of an answer: {text}")
        elif worse(entry, report.confidence):
            alone = "the gain is form alone" if gains else "worse than form alone"
            found.fails.append(f"{alone}: {text}")
        else:
            alone = "the gain may be form alone" if gains else "not shown to be more than form"
            # A rival that was asked on some rows would not be asked on more.
            needed = _how_many(entry) if entry.n == report.heldout_rows else ""
            found.unsure.append(f"{alone}: {text}{needed}")
    for rival, entry in form.train.get(candidate, {}).items():
        text = f"{entry.describe(metric, rival)} on trained rows"
        if worse(entry, report.confidence):
            found.fails.append(f"does not fit its own training rows: {text}")
        elif not beats(entry, report.confidence):
            more = "; more evaluation.train_rows would show a smaller difference"
            found.unsure.append(f"not shown to fit its own training rows: {text}{more}")
    if gate.form == "warn":
        warned = [f"warning: {text}" for text in (*found.fails, *found.unsure)]
        return Reasons(proven=[*warned, *found.proven])
    return found


def _seeds(candidate: str, report: EvalReport, gate: GateSettings) -> Reasons:
    """Judge the gain over the base as that of all trained seeds."""
    if gate.seeds == 1 or "better" not in goals(report.metric, gate).values():
        return Reasons()
    spread = (report.seeds or {}).get(candidate)
    if spread is None or len(spread.gains) != gate.seeds:
        trained = 1 if spread is None else len(spread.gains)
        return Reasons(unsure=[f"gate.seeds is {gate.seeds}, and the report has {trained}"])
    text = spread.describe(report.metric)
    if spread.low > 0:
        return Reasons(proven=[f"not luck of the seed: {text}"])
    if spread.high < 0:
        return Reasons(fails=[f"worse than the base: {text}"])
    return Reasons(unsure=[f"may be luck of the seed: {text}"])


def _prompting(entry: Difference | None, report: EvalReport, gate: GateSettings) -> Reasons:
    if entry is None or "few_shot" not in gate.must_beat or beats(entry, report.confidence):
        return Reasons()
    text = entry.describe(report.metric, "the few-shot prompt")
    if worse(entry, report.confidence):
        return Reasons(fails=[f"prompting is better than this fine-tune: {text}"])
    return Reasons(unsure=[f"not shown to be better than prompting: {text}"])


def to_beat(report: EvalReport, gate: GateSettings) -> list[str]:
    """Return the rivals that a PASS must be better than: by `must_beat` or `gate.prompting`."""
    found = [name for name, rival in (report.rivals or {}).items() if rival.must_beat]
    return list(dict.fromkeys([*found, *sorted(gate.must_beat - {"few_shot"})]))


def _rivals(candidate: str, report: EvalReport, gate: GateSettings) -> Reasons:
    """Require that the candidate is better than each rival that a PASS must be better than."""
    known = report.rivals or {}
    entries = {
        name: known[name].comparisons[candidate] if name in known else None
        for name in to_beat(report, gate)
    }
    return against_rivals(entries, report.metric, report.confidence)


def against_rivals(
    entries: Mapping[str, Difference | None], metric: str, confidence: float
) -> Reasons:
    """Judge the differences from rivals that must be beaten; None of one that was not compared."""
    found = Reasons()
    for name, entry in entries.items():
        if entry is None:
            found.unsure.append(f"not compared with the rival {name}")
            continue
        text = entry.describe(metric, name)
        if beats(entry, confidence):
            found.proven.append(f"better than the rival: {text}")
        elif worse(entry, confidence):
            found.fails.append(f"the rival is better than this fine-tune: {text}")
        else:
            found.unsure.append(f"not shown to be better than the rival: {text}")
    return found


def _hacked_reward(candidate: str, report: EvalReport) -> Reasons:
    """Fail RL that is better than SFT by a reward and worse by the verdict's metric.

    Such a reward was optimized beyond what it stands for (Gao et al. 2023).
    """
    if candidate != "rl" or not report.rewards:
        return Reasons()
    entries, confidence = report.comparisons["rl"]["sft"], report.confidence
    goal = entries[report.metric]
    if not worse(goal, confidence):
        return Reasons()
    return Reasons(
        fails=[
            f"the reward was hacked: {entries[name].describe(name, 'SFT')}, but "
            f"{goal.describe(report.metric, 'SFT')}"
            for name, weight in report.rewards.items()
            if name != report.metric and (beats if weight > 0 else worse)(entries[name], confidence)
        ]
    )


def _stopping(candidate: str, scores: Mapping[str, Scores], gate: GateSettings) -> Reasons:
    own, base = scores[candidate]["stop_rate"], scores["base"]["stop_rate"]
    if own >= gate.min_stop_rate:
        return Reasons()
    return Reasons(
        fails=[
            f"does not stop by itself: stop rate {own:.2f} < {gate.min_stop_rate} (base {base:.2f})"
        ]
    )


def _behaviour(
    candidate: str, scores: Mapping[str, Scores], gate: GateSettings, prompts: str
) -> Reasons:
    own, base = scores[candidate], scores["base"]
    found = Reasons()
    for name, verb, max_rise in (
        ("refused", "refuses", gate.max_refusal_rise),
        ("repetition", "repeats itself", gate.max_repetition_rise),
    ):
        if own[name] - base[name] > max_rise:
            found.fails.append(
                f"{verb} more than the base on {prompts} prompts: "
                f"{own[name]:.2f} against {base[name]:.2f}, at most +{max_rise}"
            )
    return found


def forgetting(candidate: str, report: EvalReport, gate: GateSettings) -> Reasons:
    """Judge the general prompts: loss and task score against the base, and behaviour.

    Each has its tolerance. Beyond it on the mean it fails; where only the interval reaches beyond
    it, the rows cannot decide.
    """
    behaviour = []
    if (retention := report.retention) is not None:
        behaviour = [_behaviour(candidate, retention.scores, gate, "general")]
    measured = [found for _, found in _forgetting_by_measure(candidate, report, gate)]
    return Reasons.joined([*behaviour, *measured])


def losses_on_general_prompts(candidate: str, report: EvalReport, gate: GateSettings) -> list[str]:
    """List what got worse on general prompts: beyond its tolerance, or proven and maybe beyond."""
    found = forgetting(candidate, report, gate).fails
    return found + [
        reason
        for entry, reasons in _forgetting_by_measure(candidate, report, gate)
        if worse(entry, report.confidence)
        for reason in reasons.unsure
    ]


def _forgetting_by_measure(
    candidate: str, report: EvalReport, gate: GateSettings
) -> list[tuple[Difference, Reasons]]:
    """Judge the loss and the task score of general prompts, and each task of the harness."""
    found = []
    if (retention := report.retention) is not None:
        against, metric = retention.comparisons[candidate]["base"], retention.metric
        found = [
            (against["loss"], _loss_rise(against["loss"], gate)),
            (against[metric], _score_drop(metric, against[metric], gate)),
        ]
    tasks = report.harness.comparisons.get(candidate, {}).get("base", {})
    return found + [(entry, _score_drop(task, entry, gate)) for task, entry in tasks.items()]


def _loss_rise(entry: Difference, gate: GateSettings) -> Reasons:
    # The difference is oriented: a rise of the loss is a negative mean.
    rise, low, high = -entry.mean, -entry.high, -entry.low
    text = f"loss of general prompts {rise:+.3f} nats/token [{low:+.3f}, {high:+.3f}]"
    max_rise = gate.max_retention_loss
    return _tolerated(entry, max_rise, f"{text}, at most +{max_rise}", gate)


def _score_drop(name: str, entry: Difference, gate: GateSettings) -> Reasons:
    max_drop = gate.max_retention_drop
    text = f"{name} of general prompts {entry.mean:+.3f} [{entry.low:+.3f}, {entry.high:+.3f}]"
    return _tolerated(entry, max_drop, f"{text}, at least -{max_drop}", gate)


def _tolerated(entry: Difference, tolerance: float, text: str, gate: GateSettings) -> Reasons:
    if entry.mean < -tolerance:
        return Reasons(fails=[f"forgets: {text}"])
    if entry.low < -tolerance:
        return Reasons(unsure=[f"may forget: {text}{_rows_for(entry, tolerance)}"])
    least = gate.min_retention_rows
    if entry.independent < least:
        return Reasons(unsure=[f"too few general prompts: {text}, {entry.rows()} < {least}"])
    return Reasons(proven=[text])


def decide(report: EvalReport, gate: GateSettings) -> Verdict:
    """Decide the verdict of a report.

    SFT, DPO and RL are judged on their own, but for Holm's correction of their p-values. A later
    training that hurts never hides a good SFT. Of two that do not, the better one is chosen.
    """
    candidates = [name for name in ADAPTERS if name in report.scores]
    against = {name: report.comparisons[name]["base"] for name in candidates}
    adjusted = adjusted_p(against, report.metric, gate)
    judged = {name: judge(name, report, gate, adjusted[name]) for name in candidates}
    passed = [name for name in candidates if judged[name].status == PASS]
    hurts = {name: later_hurts(name, report, gate) for name in candidates if name != "sft"}
    chosen = _chosen(passed, hurts, report)
    reported = chosen or max(
        candidates,
        key=lambda name: (judged[name].status == INCONCLUSIVE, report.scores[name][report.metric]),
    )
    later = {
        name: damage or "not worse than SFT on held-out and general prompts"
        for name, damage in hurts.items()
    }
    verdict = Verdict(
        status=judged[reported].status,
        candidate=chosen,
        reported_candidate=reported,
        reasons=[f"{reported}: {reason}" for reason in judged[reported].reasons],
        dpo=later.get("dpo"),
        candidates=judged,
        bound_to=report.bound_to,
    )
    return verdict.model_copy(update={"rl": later["rl"]}) if "rl" in later else verdict


def _chosen(
    passed: Sequence[str], hurts: Mapping[str, str | None], report: EvalReport
) -> str | None:
    """Return the candidate to merge. SFT only if each later one failed, or hurts it."""
    higher = report.higher_is_better(report.metric)
    if "sft" in passed:
        passed = [name for name in passed if name == "sft" or not hurts[name]]
    later = [name for name in passed if name != "sft"]
    if not later:
        return passed[0] if passed else None
    return max(later, key=lambda name: report.scores[name][report.metric] * (1 if higher else -1))


def later_hurts(candidate: str, report: EvalReport, gate: GateSettings) -> str | None:
    """Describe the damage of DPO or RL against SFT on held-out or general prompts, if there is any.

    Both comparisons are paired. One that is better on held-out rows may cost general prompts the
    usual tolerance; one that is not may cost only `gate.dpo_retention_margin`.
    """
    entry = report.comparisons[candidate]["sft"][report.metric]
    text = entry.describe(report.metric, "SFT")
    if entry.mean < -gate.dpo_margin:
        return f"lower than SFT: {text}"
    if report.retention is None:
        return None
    loss = report.retention.comparisons[candidate]["sft"]["loss"]
    better = beats(entry, report.confidence)
    allowed = gate.max_retention_loss if better else gate.dpo_retention_margin
    if loss.mean < -allowed and worse(loss, report.confidence):
        return (
            f"forgets more than SFT: {-loss.mean:+.3f} nats/token on general prompts, "
            f"at most {allowed}; {text}"
        )
    return None
