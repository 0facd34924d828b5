"""The causes of a verdict that is not a PASS: the five common ones, by frequency, with evidence.

1. the chat template is not the base's; 2. the training data is too narrow; 3. it overfits; 4. it is
undertrained; 5. the base is the wrong one. A finding is a suspicion with numbers, not a proof. A
cause without evidence in this run's numbers is not named. Of fewer than MIN_ANSWERS answers only
the template is named, whose evidence is a count of tokens and not of answers.
"""

import math
from collections import Counter
from collections.abc import Sequence

from scipy.stats import entropy

from ft_assets.config import GateSettings
from ft_assets.evaluation.report_model import (
    Diversity,
    EvalReport,
    Evidence,
    Finding,
    Scores,
    ValidationLoss,
    Verdict,
)
from ft_assets.evaluation.verdict.decision import PASS, losses_on_general_prompts
from ft_assets.metrics import registered
from ft_assets.rows.types import TokenizedRow

NARROW_TOP_ANSWER = 0.9  # share of one answer among all
NARROW_DISTINCT = 0.5  # share of distinct prompts
OVERFIT_GAP = 0.5  # nats/token between train and held-out, beyond the base's own gap
OVERFIT_TURN = 0.05  # relative rise of the validation loss above its lowest epoch
UNDERTRAINED_DROP = 0.1  # relative fall of the trained rows' loss that is hardly any
UNDERTRAINED_FALL = 0.1  # of the whole fall of the validation loss, at its last measurement
FEW_STEPS = 10  # optimizer steps
MIN_ANSWERS = 20  # held-out answers, below which their scores suggest no cause
UNTRAINED = 0.7  # of ln(vocabulary): the loss of a model that has learnt next to no language
NAMES_A_LABEL = [
    metric.name for metric in registered() if metric.binary and metric.needs_reference
]  # 1 if the answer is the right label
FOREIGN_TEMPLATE_STOPS = 0.05  # stop rate of a base that does not know the end of a turn


def diversity(rows: Sequence[TokenizedRow]) -> Diversity:
    """Measure the diversity of the prompts and the answers of training rows."""
    prompts = Counter(row["group"] for row in rows)
    answers = Counter(row["messages"][-1]["content"].strip() for row in rows)
    counts = list(answers.values())
    return Diversity(
        rows=len(rows),
        distinct_prompts=len(prompts) / len(rows),
        answer_entropy_bits=float(entropy(counts, base=2)),
        top_answer=max(counts) / len(rows),
    )


def diagnose(report: EvalReport, verdict: Verdict, gate: GateSettings) -> list[Finding]:
    """Return the findings in the order above; empty after a PASS, or without evidence."""
    if verdict.status == PASS:
        return []
    evidence, candidate = report.evidence, verdict.reported_candidate
    template = _template(report)
    if (report.heldout_groups or report.heldout_rows) < MIN_ANSWERS:
        return [template] if template else []
    overfit = _overfit(report, evidence)
    undertrained = _undertrained(evidence) if overfit is None else None
    found = [
        template,
        _narrow(report, evidence, candidate, gate, undertrained is not None),
        overfit,
        undertrained,
        # A base under a foreign template looks like a bad base.
        _wrong_base(report, evidence, candidate) if template is None else None,
    ]
    return [finding for finding in found if finding is not None]


def _finding(cause: str, evidence: list[str], advice: str) -> Finding | None:
    return Finding(cause=cause, evidence=evidence, advice=advice) if evidence else None


def _template(report: EvalReport) -> Finding | None:
    found, proofs = [], report.proofs
    if proofs.template_mismatches:
        found.append(
            f"{len(proofs.template_mismatches)} rows were tokenized with another template "
            "than the model's answers are"
        )
    # The loss alone does not show it: a model may predict well and yet not stop, or answer in
    # another tone.
    if (own := proofs.own_template) is not None:
        found.append(
            "chat.chat_template replaces the base's own template "
            f"(its loss on the {own.rows} answers: {own.loss_as_configured:.2f} nats/token, "
            f"{own.loss:.2f} with its own)"
        )
    return _finding(
        "template mismatch",
        found,
        "remove chat.chat_template so that the base's own template is used; "
        "materialize chat_dataset and all that follows again",
    )


def _narrow(
    report: EvalReport, evidence: Evidence, candidate: str, gate: GateSettings, undertrained: bool
) -> Finding | None:
    spread = evidence.train
    # What may be chance is not evidence, but a proven loss is, also if it may be tolerable.
    found = losses_on_general_prompts(candidate, report, gate)
    if spread.top_answer >= NARROW_TOP_ANSWER:
        found.append(
            f"{spread.top_answer:.0%} of the training answers are the same one "
            f"({spread.answer_entropy_bits:.2f} bits)"
        )
    if spread.distinct_prompts < NARROW_DISTINCT:
        found.append(
            f"only {spread.distinct_prompts:.0%} of the {spread.rows} training prompts are distinct"
        )
    return _finding(
        "training data too narrow",
        found,
        "add general conversations as data.rehearsal, more kinds of prompts and answers"
        + ("" if undertrained else "; fewer epochs or a lower sft.learning_rate"),
    )


def _overfit(report: EvalReport, evidence: Evidence) -> Finding | None:
    # SFT's own numbers: DPO moves the loss of the reference answers for reasons of its own.
    found = [
        sentence
        for sentence in (
            _train_gap(evidence.train_loss, report.scores),
            _validation_turn(evidence.validation),
        )
        if sentence is not None
    ]
    return _finding(
        "overfit",
        found,
        "fewer epochs (sft.num_train_epochs), more training rows, lora_dropout, a smaller lora.r",
    )


def _train_gap(train: Scores, scores: dict[str, Scores]) -> str | None:
    heldout = {name: scores[name]["loss"] for name in ("sft", "base")}
    gap = heldout["sft"] - train["sft"]
    usual = heldout["base"] - train["base"]
    if gap - usual <= OVERFIT_GAP:
        return None
    return (
        f"SFT's loss is {train['sft']:.2f} nats/token on trained rows and {heldout['sft']:.2f} "
        f"on held-out rows (base: {train['base']:.2f}, {heldout['base']:.2f})"
    )


def _validation_turn(curve: list[ValidationLoss]) -> str | None:
    if len(curve) <= 2:
        return None
    lowest = min(curve, key=lambda point: point.validation_loss)
    last = curve[-1]
    rose = last.validation_loss > lowest.validation_loss * (1 + OVERFIT_TURN)
    if not rose or lowest.epoch >= last.epoch:
        return None
    return (
        f"the validation loss was lowest at epoch {lowest.epoch:g} ({lowest.validation_loss:.3f}) "
        f"and rose to {last.validation_loss:.3f} at epoch {last.epoch:g}"
    )


def _undertrained(evidence: Evidence) -> Finding | None:
    """Return the finding of a training that ended before it learnt its rows."""
    base, tuned = (evidence.train_loss.get(name) for name in ("base", "sft"))
    steps = evidence.steps
    found = []
    if base and tuned is not None and tuned > base * (1 - UNDERTRAINED_DROP):
        found.append(
            f"on its own training rows SFT's loss is {tuned:.2f} nats/token, the base's {base:.2f}"
        )
    losses = [point.validation_loss for point in evidence.validation]
    if len(losses) > 2 and evidence.kept_is_last and losses[-1] == min(losses):
        fall = losses[-2] - losses[-1]
        if fall > UNDERTRAINED_FALL * (losses[0] - losses[-1]):
            found.append(
                "the validation loss still fell at the end, "
                f"from {losses[-2]:.3f} to {losses[-1]:.3f} (at first {losses[0]:.3f})"
            )
    if steps is not None and steps < FEW_STEPS:
        found.append(f"SFT took {steps} steps on {evidence.train.rows} training rows")
    return _finding(
        "undertrained",
        found,
        "more epochs (sft.num_train_epochs) without sft.max_steps, a higher sft.learning_rate, "
        "more training rows",
    )


def _wrong_base(report: EvalReport, evidence: Evidence, candidate: str) -> Finding | None:
    found = [
        sentence
        for sentence in (
            _untrained(report, evidence) or _never_stops(report, evidence),
            _at_chance(report, evidence.labels, candidate),
        )
        if sentence is not None
    ]
    return _finding(
        "wrong base model",
        found,
        "take the instruction-tuned version of a larger or newer base, whose own template is in "
        "its tokenizer; raw instructions into a chat model need its chat form",
    )


def _untrained(report: EvalReport, evidence: Evidence) -> str | None:
    uniform = math.log(evidence.vocabulary)
    loss = report.scores["base"]["loss"]
    if report.retention:
        loss = min(loss, report.retention.scores["base"]["loss"])
    if loss <= UNTRAINED * uniform:
        return None
    return (
        f"the base's loss is {loss:.2f} nats/token, {loss / uniform:.0%} of a uniform guess "
        f"(ln {evidence.vocabulary} = {uniform:.2f}): it has learnt next to no language"
    )


def _never_stops(report: EvalReport, evidence: Evidence) -> str | None:
    stops = report.scores["base"]["stop_rate"]
    general = 1.0 if evidence.general_stop_rate is None else evidence.general_stop_rate
    if max(stops, general) > FOREIGN_TEMPLATE_STOPS:
        return None
    return (
        f"the base ends {stops:.0%} of its answers, and {general:.0%} to general prompts: "
        "it does not know the template's end of turn (a base model, not a chat model?)"
    )


def _at_chance(report: EvalReport, labels: int, candidate: str) -> str | None:
    if not labels or report.metric not in NAMES_A_LABEL:
        return None
    base, tuned = (report.scores[name][report.metric] for name in ("base", candidate))
    # The interval: of few answers 0.7 may be a chance of 0.5, and may be well above it.
    above = candidate in report.intervals and report.intervals[candidate][0] > 1 / labels
    if above or not tuned <= 1.5 / labels >= base:
        return None
    return f"base {base:.3f} and {candidate} {tuned:.3f} are at the chance of {labels} labels"
