"""The verdict: PASS, FAIL or INCONCLUSIVE, a pure function of the report's numbers and the gate.

The asset checks, the report and `merged_model` (by gate.py) call this module; nothing else decides. It fails closed:
what cannot be told is no PASS. Not here: what the verdict is bound to (gate.py), why it is no PASS (diagnosis.py).
"""

from collections.abc import Mapping
from typing import Any

from ft_assets.config import GateSettings

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
Reasons = tuple[list[str], list[str], list[str]]  # what fails, what cannot be told, what is proven


def beats(entry: Mapping[str, Any], confidence: float, p: float | None = None) -> bool:
    """Return whether a paired difference is above zero: both its interval and its test say so."""
    return entry["low"] > 0 and (entry["p"] if p is None else p) < 1 - confidence


def worse(entry: Mapping[str, Any], confidence: float, p: float | None = None) -> bool:
    """Return whether a paired difference is below zero: both its interval and its test say so."""
    return entry["high"] < 0 and (entry["p"] if p is None else p) < 1 - confidence


def said(metric: str, entry: Mapping[str, Any], rival: str = "base") -> str:
    """Return a paired difference as text."""
    return f"{metric} {entry['mean']:+.3f} against {rival} [{entry['low']:+.3f}, {entry['high']:+.3f}], p {entry['p']:.2g}, n={entry['n']}"


def judge(candidate: str, report: Mapping[str, Any], gate: GateSettings) -> dict[str, Any]:
    """Return {"status", "reasons", "forgets"} of one candidate against the base."""
    parts = [
        _integrity(report),
        quality(report["comparisons"][candidate]["base"], report["metric"], gate),
        _prompting(report["comparisons"][candidate].get("few_shot", {}).get(report["metric"]), report["metric"], gate),
        _habits(candidate, report["scores"], gate, "held-out", with_stop_rate=True),
        forgetting(candidate, report, gate),
    ]
    fails, unsure, proven = ([reason for part in parts for reason in part[index]] for index in range(3))
    rows = report["heldout_rows"]
    if rows < gate.min_heldout_rows:
        unsure.append(f"too few held-out rows: {rows} < {gate.min_heldout_rows}")
    status = FAIL if fails else INCONCLUSIVE if unsure else PASS
    return {"status": status, "reasons": fails or unsure or proven, "forgets": bool(parts[4][0])}


def _integrity(report: Mapping[str, Any]) -> Reasons:
    mismatches = report["proofs"]["template_mismatches"]
    if not mismatches:
        return [], [], []
    return [f"template mismatch: {len(mismatches)} rows were tokenized with another template, e.g. {mismatches[0]}"], [], []


def quality(against: Mapping[str, Any], metric: str, gate: GateSettings) -> Reasons:
    """Judge the metrics that a PASS needs. With several that must be better, one is enough if none is worse, and the
    p-values are Holm's; each margin must be kept (intersection–union: no correction is needed)."""
    from ft_assets.evaluation.statistics import holm  # statsmodels: the code location does without

    fails, unsure, proven = [], [], []
    goals = gate.metrics or {metric: "better"}
    wanted = [metric for metric, goal in goals.items() if goal == "better"]
    adjusted = holm({metric: against[metric]["p"] for metric in wanted})
    better = [metric for metric in wanted if beats(against[metric], gate.confidence, adjusted[metric])]
    fails += [
        f"worse than the base: {said(metric, against[metric])}"
        for metric in wanted
        if worse(against[metric], gate.confidence, adjusted[metric])
    ]
    proven += [f"better than the base: {said(metric, against[metric])}" for metric in better]
    if wanted and not better and not fails:
        unsure += [f"cannot tell it from the base: {said(metric, against[metric])}{_how_many(against[metric])}" for metric in wanted]
    for metric, margin in goals.items():
        if margin == "better":
            continue
        entry = against[metric]
        if entry["high"] < -margin:
            fails.append(f"worse than the base by more than {margin}: {said(metric, entry)}")
        elif entry["low"] <= -margin:
            unsure.append(f"may be worse than the base by more than {margin}: {said(metric, entry)}")
        else:
            proven.append(f"not worse than the base by {margin}: {said(metric, entry)}")
    return fails, unsure, proven


def _how_many(entry: Mapping[str, Any]) -> str:
    seen = f"; {entry['n']} rows find a difference of {entry['detectable']:.3f} four times in five" if entry["detectable"] else ""
    if not entry["rows_needed"] or entry["rows_needed"] <= entry["n"]:
        return seen
    return f"{seen}; about {entry['rows_needed']} held-out rows would decide one of this size"


def _prompting(entry: Mapping[str, Any] | None, metric: str, gate: GateSettings) -> Reasons:
    if entry is None or gate.prompting == "warn" or beats(entry, gate.confidence):
        return [], [], []
    text = f"you do not need this fine-tune: {said(metric, entry, 'the few-shot prompt')}"
    return ([text], [], []) if worse(entry, gate.confidence) else ([], [text], [])


def _habits(candidate: str, scores: Mapping[str, Any], gate: GateSettings, where: str, with_stop_rate: bool = False) -> Reasons:
    mine, base, fails = scores[candidate], scores["base"], []
    if with_stop_rate and mine["stop_rate"] < gate.min_stop_rate:
        fails.append(f"does not stop by itself: stop rate {mine['stop_rate']:.2f} < {gate.min_stop_rate} (base {base['stop_rate']:.2f})")
    for name, most in (("refused", gate.max_refusal_rise), ("repetition", gate.max_repetition_rise)):
        if mine[name] - base[name] > most:
            verb = "refuses" if name == "refused" else "repeats itself"
            fails.append(f"{verb} more than the base on {where} prompts: {mine[name]:.2f} against {base[name]:.2f}, at most +{most}")
    return fails, [], []


def forgetting(candidate: str, report: Mapping[str, Any], gate: GateSettings) -> Reasons:
    """Judge the general prompts: the loss and the task score against the base, each with its tolerance, and habits.

    Above the tolerance on the mean it fails; where the interval reaches beyond it, it cannot be told.
    """
    retention = report["retention"]
    if retention is None:
        return [], [], []
    against, metric = retention["comparisons"][candidate]["base"], retention["metric"]
    fails, unsure, proven = _habits(candidate, retention["scores"], gate, "general")
    for name, tolerance, unit in (("loss", gate.max_retention_loss, " nats/token"), (metric, gate.max_retention_drop, "")):
        entry = against[name]
        # Oriented: a rise of the loss is a negative mean.
        text = f"general prompts: {name} worse by {-entry['mean']:+.3f}{unit} [{-entry['high']:+.3f}, {-entry['low']:+.3f}]"
        if entry["mean"] < -tolerance:
            fails.append(f"forgets: {text}, at most {tolerance}")
        elif entry["low"] < -tolerance:
            unsure.append(f"may forget: {text}, at most {tolerance}; more retention rows would decide")
        else:
            proven.append(f"{text}, at most {tolerance}")
    return fails, unsure, proven


def decide(report: Mapping[str, Any], gate: GateSettings) -> dict[str, Any]:
    """Return the verdict: status, reasons, the candidate to merge (or None), the candidate that the reasons speak about,
    each candidate's own judgement, why DPO was taken or not, and the binding.

    SFT and DPO are judged on their own: two chances of a one-sided error of (1 − confidence) / 2 each, so that a false
    PASS stays below 1 − confidence. A DPO that hurts never hides a good SFT.
    """
    candidates = [name for name in ("sft", "dpo") if name in report["scores"]]
    judged = {name: judge(name, report, gate) for name in candidates}
    metric = report["metric"]
    passed = [name for name in candidates if judged[name]["status"] == PASS]
    hurts = dpo_hurts(report, gate) if "dpo" in candidates else None
    chosen = passed[0] if passed else None
    if passed == ["sft", "dpo"]:
        chosen = "sft" if hurts else "dpo"
    speaker = chosen or max(candidates, key=lambda name: (judged[name]["status"] == INCONCLUSIVE, report["scores"][name][metric]))
    return {
        "status": judged[speaker]["status"],
        "candidate": chosen,
        "speaker": speaker,
        "reasons": [f"{speaker}: {reason}" for reason in judged[speaker]["reasons"]],
        "dpo": hurts or ("not worse than SFT on held-out and general prompts" if "dpo" in candidates else None),
        "candidates": judged,
        "bound_to": report["bound_to"],
    }


def dpo_hurts(report: Mapping[str, Any], gate: GateSettings) -> str | None:
    """Return how DPO is worse than SFT, paired on held-out and on general prompts; None if it is not."""
    entry = report["comparisons"]["dpo"]["sft"][report["metric"]]
    if entry["mean"] < -gate.dpo_margin:
        return f"lower than SFT: {said(report['metric'], entry, 'SFT')}"
    if report["retention"] is not None:
        loss = report["retention"]["comparisons"]["dpo"]["sft"]["loss"]
        if loss["mean"] < -gate.dpo_retention_margin and worse(loss, gate.confidence):
            return f"forgets more than SFT: {-loss['mean']:+.3f} nats/token on general prompts, at most {gate.dpo_retention_margin}"
    return None
