"""Why it is not a PASS: the four common causes in the order of their frequency, each with evidence from this run.

1. the chat template is not the base's; 2. the training data is too narrow; 3. it overfits; 4. the base is the wrong one.
A finding is a suspicion with numbers, not a proof: where no number speaks for a cause, it is not named.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from scipy.stats import entropy

from ft_assets.config import GateSettings
from ft_assets.evaluation.verdict.decision import PASS, forgetting

NARROW_TOP_ANSWER = 0.9  # share of one answer among all
NARROW_DISTINCT = 0.5  # share of distinct prompts
OVERFIT_GAP = 0.5  # nats a token between train and held-out, beyond the base's own gap
OVERFIT_TURN = 0.05  # relative rise of the validation loss above its lowest epoch
UNTRAINED = 0.7  # of ln(vocabulary): a loss that knows next to nothing of language
FOREIGN_TEMPLATE_STOPS = 0.05  # stop rate of a base that does not know the end of a turn


def diversity(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return of training rows: rows, share of distinct prompts, entropy of the answers in bits, share of the commonest."""
    prompts = Counter(row["group"] for row in rows)
    answers = Counter(row["messages"][-1]["content"].strip() for row in rows)
    counts = list(answers.values())
    return {
        "rows": len(rows),
        "distinct_prompts": len(prompts) / len(rows),
        "answer_entropy_bits": float(entropy(counts, base=2)),
        "top_answer": max(counts) / len(rows),
    }


def diagnose(
    report: Mapping[str, Any], verdict: Mapping[str, Any], gate: GateSettings
) -> list[dict[str, Any]]:
    """Return [{"cause", "evidence", "try"}] in the order above; empty after a PASS, or if nothing speaks for any cause."""
    if verdict["status"] == PASS:
        return []
    evidence, candidate = report["evidence"], verdict["speaker"]
    template = _template(report)
    found = [
        template,
        _narrow(report, evidence, candidate, gate),
        _overfit(report, evidence),
        # A base that is shown a foreign template looks like a bad base.
        _wrong_base(report, evidence, candidate) if template is None else None,
    ]
    return [finding for finding in found if finding is not None]


def _finding(cause: str, evidence: list[str], advice: str) -> dict[str, Any] | None:
    return {"cause": cause, "evidence": evidence, "try": advice} if evidence else None


def _template(report: Mapping[str, Any]) -> dict[str, Any] | None:
    found, proofs = [], report["proofs"]
    if proofs["template_mismatches"]:
        found.append(
            f"{len(proofs['template_mismatches'])} rows were tokenized with another template than the model's answers are"
        )
    own = proofs.get("own_template")
    if (
        own is not None
    ):  # the loss alone does not show it: a model may predict well and yet not stop, or answer in another tone
        found.append(
            f"chat.chat_template replaces the base's own template (its loss on the {own['rows']} answers: {own['loss_as_configured']:.2f} nats/token, {own['loss']:.2f} with its own)"
        )
    return _finding(
        "template mismatch",
        found,
        "remove chat.chat_template so that the base's own template is used; materialize chat_dataset and all that follows again",
    )


def _narrow(
    report: Mapping[str, Any], evidence: Mapping[str, Any], candidate: str, gate: GateSettings
) -> dict[str, Any] | None:
    forgotten, perhaps, _ = forgetting(candidate, report, gate)
    spread, found = evidence["train"], [*forgotten, *perhaps]
    if spread["top_answer"] >= NARROW_TOP_ANSWER:
        found.append(
            f"{spread['top_answer']:.0%} of the training answers are the same one ({spread['answer_entropy_bits']:.2f} bits)"
        )
    if spread["distinct_prompts"] < NARROW_DISTINCT:
        found.append(
            f"only {spread['distinct_prompts']:.0%} of the {spread['rows']} training prompts are distinct"
        )
    return _finding(
        "training data too narrow",
        found,
        "add general conversations as data.rehearsal, more kinds of prompts and answers; fewer epochs or a lower sft.learning_rate",
    )


def _overfit(report: Mapping[str, Any], evidence: Mapping[str, Any]) -> dict[str, Any] | None:
    found = []
    # SFT's own numbers: DPO moves the loss of the reference answers for reasons of its own.
    train, heldout = evidence["train_loss"], report["scores"]
    gap = heldout["sft"]["loss"] - train["sft"]
    usual = heldout["base"]["loss"] - train["base"]
    if gap - usual > OVERFIT_GAP:
        found.append(
            f"SFT's loss is {train['sft']:.2f} nats/token on trained rows and {heldout['sft']['loss']:.2f} on held-out rows (base: {train['base']:.2f}, {heldout['base']['loss']:.2f})"
        )
    curve = evidence["validation"]
    if len(curve) > 2:
        lowest = min(curve, key=lambda entry: entry["validation_loss"])
        last = curve[-1]
        if (
            last["validation_loss"] > lowest["validation_loss"] * (1 + OVERFIT_TURN)
            and lowest["epoch"] < last["epoch"]
        ):
            found.append(
                f"the validation loss was lowest at epoch {lowest['epoch']:g} ({lowest['validation_loss']:.3f}) and rose to {last['validation_loss']:.3f} at epoch {last['epoch']:g}"
            )
    return _finding(
        "overfit",
        found,
        "fewer epochs (sft.num_train_epochs), more training rows, lora_dropout, a smaller lora.r",
    )


def _wrong_base(
    report: Mapping[str, Any], evidence: Mapping[str, Any], candidate: str
) -> dict[str, Any] | None:
    base, tuned, found = report["scores"]["base"], report["scores"][candidate], []
    most = math.log(evidence["vocabulary"])
    general_stops = 1.0 if evidence["general_stop_rate"] is None else evidence["general_stop_rate"]
    general = report["retention"]["scores"]["base"]["loss"] if report["retention"] else base["loss"]
    if min(base["loss"], general) > UNTRAINED * most:
        found.append(
            f"the base's loss is {min(base['loss'], general):.2f} nats/token, {min(base['loss'], general) / most:.0%} of a uniform guess (ln {evidence['vocabulary']} = {most:.2f}): it has learnt next to no language"
        )
    elif max(base["stop_rate"], general_stops) <= FOREIGN_TEMPLATE_STOPS:
        found.append(
            f"the base ends {base['stop_rate']:.0%} of its answers, and {general_stops:.0%} to general prompts: it does not know the template's end of turn (a base model, not a chat model?)"
        )
    labels = evidence["labels"]
    if (
        labels
        and report["metric"] in ("label", "choice", "exact")
        and tuned[report["metric"]] <= 1.5 / labels >= base[report["metric"]]
    ):
        found.append(
            f"base {base[report['metric']]:.3f} and {candidate} {tuned[report['metric']]:.3f} are at the chance of {labels} labels"
        )
    return _finding(
        "wrong base model",
        found,
        "take the instruction-tuned version of a larger or newer base, whose own template is in its tokenizer; raw instructions into a chat model need its chat form",
    )
