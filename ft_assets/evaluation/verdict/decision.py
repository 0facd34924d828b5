"""The verdict: PASS, FAIL or INCONCLUSIVE, a pure function of the report's numbers and the gate.

The asset checks, the report and `merged_model` (by gate.py) call this module; nothing else decides. It fails closed:
what cannot be told is no PASS. Not here: what the verdict is bound to (gate.py), why it is no PASS (diagnosis.py).
"""

from collections.abc import Mapping
from typing import Any

from ft_assets.config import GateSettings
from ft_assets.evaluation.verdict.holm import holm

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
Reasons = tuple[list[str], list[str], list[str]]  # what fails, what cannot be told, what is proven


def beats(entry: Mapping[str, Any], confidence: float, p: float | None = None) -> bool:
    """Return whether a paired difference is above zero: its test says so, and its interval does not reach below."""
    # Not low > 0: for 0/1 scores the bootstrap moves in steps of 1/n, and that would cost a step of power.
    return (
        entry["mean"] > 0
        and entry["low"] >= 0
        and (entry["p"] if p is None else p) < 1 - confidence
    )


def worse(entry: Mapping[str, Any], confidence: float, p: float | None = None) -> bool:
    """Return whether a paired difference is below zero: its test says so, and its interval does not reach above."""
    return (
        entry["mean"] < 0
        and entry["high"] <= 0
        and (entry["p"] if p is None else p) < 1 - confidence
    )


def said(metric: str, entry: Mapping[str, Any], rival: str = "base") -> str:
    """Return a paired difference as text."""
    return f"{metric} {entry['mean']:+.3f} against {rival} [{entry['low']:+.3f}, {entry['high']:+.3f}], p {entry['p']:.2g}, n={entry['n']}"


def judge(
    candidate: str, report: Mapping[str, Any], gate: GateSettings, adjusted: Mapping[str, float]
) -> dict[str, Any]:
    """Return {"status", "reasons"} of one candidate against the base; `adjusted` are its Holm p-values by metric."""
    parts = [
        _integrity(report),
        quality(report["comparisons"][candidate]["base"], report["metric"], gate, adjusted),
        _chance(report["chance"].get(candidate), report["metric"], gate),
        _prompting(
            report["comparisons"][candidate].get("few_shot", {}).get(report["metric"]),
            report["metric"],
            gate,
        ),
        _habits(candidate, report["scores"], gate, "held-out", with_stop_rate=True),
        forgetting(candidate, report, gate),
    ]
    fails, unsure, proven = (
        [reason for part in parts for reason in part[index]] for index in range(3)
    )
    rows = report["heldout_rows"]
    if rows < gate.min_heldout_rows:
        unsure.append(f"too few held-out rows: {rows} < {gate.min_heldout_rows}")
    status = FAIL if fails else INCONCLUSIVE if unsure else PASS
    return {"status": status, "reasons": fails or unsure or proven}


def _integrity(report: Mapping[str, Any]) -> Reasons:
    mismatches = report["proofs"]["template_mismatches"]
    if not mismatches:
        return [], [], []
    return (
        [
            f"template mismatch: {len(mismatches)} rows were tokenized with another template, e.g. {mismatches[0]}"
        ],
        [],
        [],
    )


def goals(metric: str, gate: GateSettings) -> Mapping[str, Any]:
    """Return what a PASS needs: {metric: "better" or a margin}."""
    return gate.metrics or {metric: "better"}


def adjusted_p(
    against: Mapping[str, Mapping[str, Any]], metric: str, gate: GateSettings
) -> dict[str, dict[str, float]]:
    """Return {candidate: {metric: p}}, by Holm over all candidates and all metrics that must be better: each is a chance
    of a false PASS. `against` is {candidate: its differences to the base by metric}."""
    wanted = [name for name, goal in goals(metric, gate).items() if goal == "better"]
    adjusted = holm(
        {
            f"{candidate} {name}": entries[name]["p"]
            for candidate, entries in against.items()
            for name in wanted
        }
    )
    return {
        candidate: {name: adjusted[f"{candidate} {name}"] for name in wanted}
        for candidate in against
    }


def quality(
    against: Mapping[str, Any], metric: str, gate: GateSettings, adjusted: Mapping[str, float]
) -> Reasons:
    """Judge the metrics that a PASS needs. With several that must be better, one is enough if none is worse, by Holm's
    p-values; each margin must be kept (intersection–union: no correction is needed)."""
    fails, unsure, proven = [], [], []
    wanted = list(adjusted)
    better = [
        metric for metric in wanted if beats(against[metric], gate.confidence, adjusted[metric])
    ]
    fails += [
        f"worse than the base: {said(metric, against[metric])}"
        for metric in wanted
        if worse(against[metric], gate.confidence, adjusted[metric])
    ]
    proven += [f"better than the base: {said(metric, against[metric])}" for metric in better]
    if wanted and not better and not fails:
        unsure += [
            f"cannot tell it from the base: {said(metric, against[metric])}{_how_many(against[metric])}"
            for metric in wanted
        ]
    for name, margin in goals(metric, gate).items():
        if margin == "better":
            continue
        entry = against[name]
        if entry["high"] < -margin:
            fails.append(f"worse than the base by more than {margin}: {said(name, entry)}")
        elif entry["low"] <= -margin:
            unsure.append(f"may be worse than the base by more than {margin}: {said(name, entry)}")
        else:
            proven.append(f"not worse than the base by {margin}: {said(name, entry)}")
    return fails, unsure, proven


def _how_many(entry: Mapping[str, Any]) -> str:
    seen = (
        f"; {entry['n']} rows find a difference of {entry['detectable']:.3f} four times in five"
        if entry["detectable"]
        else ""
    )
    if not entry["rows_needed"] or entry["rows_needed"] <= entry["n"]:
        return seen
    return f"{seen}; about {entry['rows_needed']} held-out rows would decide one of this size"


def _chance(entry: Mapping[str, Any] | None, metric: str, gate: GateSettings) -> Reasons:
    if entry is None or beats(entry, gate.confidence):
        return [], [], []
    return (
        [],
        [
            f"the answers fit other rows' references as well: {said(metric, entry, 'shuffled references')}"
        ],
        [],
    )


def _prompting(entry: Mapping[str, Any] | None, metric: str, gate: GateSettings) -> Reasons:
    if entry is None or gate.prompting == "warn" or beats(entry, gate.confidence):
        return [], [], []
    text = f"you do not need this fine-tune: {said(metric, entry, 'the few-shot prompt')}"
    return ([text], [], []) if worse(entry, gate.confidence) else ([], [text], [])


def _habits(
    candidate: str,
    scores: Mapping[str, Any],
    gate: GateSettings,
    where: str,
    with_stop_rate: bool = False,
) -> Reasons:
    mine, base, fails = scores[candidate], scores["base"], []
    if with_stop_rate and mine["stop_rate"] < gate.min_stop_rate:
        fails.append(
            f"does not stop by itself: stop rate {mine['stop_rate']:.2f} < {gate.min_stop_rate} (base {base['stop_rate']:.2f})"
        )
    for name, most in (
        ("refused", gate.max_refusal_rise),
        ("repetition", gate.max_repetition_rise),
    ):
        if mine[name] - base[name] > most:
            verb = "refuses" if name == "refused" else "repeats itself"
            fails.append(
                f"{verb} more than the base on {where} prompts: {mine[name]:.2f} against {base[name]:.2f}, at most +{most}"
            )
    return fails, [], []


def forgetting(candidate: str, report: Mapping[str, Any], gate: GateSettings) -> Reasons:
    """Judge the general prompts: the loss and the task score against the base, each with its tolerance, and habits.

    Above the tolerance on the mean it fails; where the interval reaches beyond it, it cannot be told.
    """
    retention, measured = report["retention"], []
    fails, unsure, proven = [], [], []
    if retention is not None:
        against, metric = retention["comparisons"][candidate]["base"], retention["metric"]
        fails, unsure, proven = _habits(candidate, retention["scores"], gate, "general")
        measured = [
            ("loss", against["loss"], gate.max_retention_loss, " nats/token"),
            (metric, against[metric], gate.max_retention_drop, ""),
        ]
    tasks = report["harness"]["comparisons"].get(candidate, {}).get("base", {})
    measured += [(task, entry, gate.max_retention_drop, "") for task, entry in tasks.items()]
    for name, entry, tolerance, unit in measured:
        # Oriented: a rise of the loss is a negative mean.
        low, mean, high = (
            entry[key] if name != "loss" else -entry[key] for key in ("low", "mean", "high")
        )
        text = f"{name} of general prompts {mean:+.3f}{unit} [{min(low, high):+.3f}, {max(low, high):+.3f}]"
        allowed = f"{'at most +' if name == 'loss' else 'at least -'}{tolerance}"
        if entry["mean"] < -tolerance:
            fails.append(f"forgets: {text}, {allowed}")
        elif entry["low"] < -tolerance:
            unsure.append(f"may forget: {text}, {allowed}; more retention rows would decide")
        else:
            proven.append(f"{text}, {allowed}")
    return fails, unsure, proven


def decide(report: Mapping[str, Any], gate: GateSettings) -> dict[str, Any]:
    """Return the verdict: status, reasons, the candidate to merge (or None), the candidate that the reasons speak about,
    each candidate's own judgement, why DPO was taken or not, and the binding.

    SFT and DPO are judged on their own, but for Holm's correction of their p-values. A DPO that hurts never hides a
    good SFT.
    """
    candidates, metric = (
        [name for name in ("sft", "dpo") if name in report["scores"]],
        report["metric"],
    )
    adjusted = adjusted_p(
        {name: report["comparisons"][name]["base"] for name in candidates}, metric, gate
    )
    judged = {name: judge(name, report, gate, adjusted[name]) for name in candidates}
    passed = [name for name in candidates if judged[name]["status"] == PASS]
    hurts = dpo_hurts(report, gate) if "dpo" in candidates else None
    chosen = passed[0] if passed else None
    if passed == ["sft", "dpo"]:
        chosen = "sft" if hurts else "dpo"
    speaker = chosen or max(
        candidates,
        key=lambda name: (judged[name]["status"] == INCONCLUSIVE, report["scores"][name][metric]),
    )
    return {
        "status": judged[speaker]["status"],
        "candidate": chosen,
        "speaker": speaker,
        "reasons": [f"{speaker}: {reason}" for reason in judged[speaker]["reasons"]],
        "dpo": hurts
        or ("not worse than SFT on held-out and general prompts" if "dpo" in candidates else None),
        "candidates": judged,
        "bound_to": report["bound_to"],
    }


def dpo_hurts(report: Mapping[str, Any], gate: GateSettings) -> str | None:
    """Return how DPO is worse than SFT, paired on held-out and on general prompts; None if it is not.

    A DPO that is better on held-out may cost general prompts the usual tolerance; one that is not may cost next to nothing.
    """
    entry = report["comparisons"]["dpo"]["sft"][report["metric"]]
    if entry["mean"] < -gate.dpo_margin:
        return f"lower than SFT: {said(report['metric'], entry, 'SFT')}"
    if report["retention"] is not None:
        loss = report["retention"]["comparisons"]["dpo"]["sft"]["loss"]
        allowed = (
            gate.max_retention_loss if beats(entry, gate.confidence) else gate.dpo_retention_margin
        )
        if loss["mean"] < -allowed and worse(loss, gate.confidence):
            return f"forgets more than SFT: {-loss['mean']:+.3f} nats/token on general prompts, at most {allowed}; {said(report['metric'], entry, 'SFT')}"
    return None
