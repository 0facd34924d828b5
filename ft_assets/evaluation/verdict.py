"""The verdict: PASS, FAIL or INCONCLUSIVE, a pure function of the report's numbers and the gate, bound to versions.

Both the asset checks and `merged_model` call this module; nothing else decides. It fails closed: what is missing,
edited or of another version is no PASS.
"""

import json
from collections.abc import Mapping
from typing import Any

from ft_assets.artifacts import Artifact, verify_files
from ft_assets.config import GateSettings
from ft_assets.errors import ArtifactError, VerdictError

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
BOUND = ("base_model", "lora_adapter", "dpo_adapter", "heldout", "retention")


def beats(comparison: Mapping[str, Any], confidence: float) -> bool:
    """Return whether a paired difference is above zero: its interval and, for right/wrong scores, McNemar's exact test say so."""
    p = comparison["p_mcnemar"]
    return comparison["low"] > 0 and (p is None or p < 1 - confidence)


def judge(candidate: str, report: Mapping[str, Any], gate: GateSettings) -> dict[str, Any]:
    """Return {"status", "reasons"} of one candidate against the base."""
    metric = report["metric"]
    against = report["comparisons"][candidate]["base"][metric]
    retention = report["retention"][candidate]
    stop_rate = report["scores"][candidate]["stop_rate"]
    said = f"{metric} {against['mean']:+.3f} against base, {gate.confidence:.0%} interval [{against['low']:+.3f}, {against['high']:+.3f}], n={against['n']}"
    fails, unsure = [], []
    if against["high"] < 0:
        fails.append(f"worse than the base: {said}")
    if stop_rate < gate.min_stop_rate:
        fails.append(f"does not stop by itself: stop rate {stop_rate:.2f} < {gate.min_stop_rate}")
    if retention is not None and retention["mean"] > gate.max_retention_loss:
        fails.append(f"forgets: general loss {retention['mean']:+.3f} nats/token > {gate.max_retention_loss}")
    if against["n"] < gate.min_heldout_rows:
        unsure.append(f"too few held-out rows: {against['n']} < {gate.min_heldout_rows}")
    if not beats(against, gate.confidence):
        needed = f"; about {against['rows_needed']} held-out rows would decide" if against["rows_needed"] and against["mean"] > 0 else ""
        unsure.append(f"cannot tell it from the base: {said}{needed}")
    if fails:
        return {"status": FAIL, "reasons": fails}
    if unsure:
        return {"status": INCONCLUSIVE, "reasons": unsure}
    return {"status": PASS, "reasons": [f"better than the base: {said}"]}


def decide(report: Mapping[str, Any], gate: GateSettings) -> dict[str, Any]:
    """Return the verdict: status, reasons, the candidate to merge (or None), each candidate's own judgement, and the binding.

    DPO leaves if it passes and is not worse than SFT on the mean; else SFT if it passes; a DPO that hurts never hides
    a good SFT.
    """
    candidates = [name for name in ("sft", "dpo") if name in report["scores"]]
    judged = {name: judge(name, report, gate) for name in candidates}
    metric = report["metric"]
    chosen = "sft" if judged["sft"]["status"] == PASS else None
    if "dpo" in judged and judged["dpo"]["status"] == PASS:
        better = report["comparisons"]["dpo"]["sft"][metric]["mean"]
        if chosen is None or better >= 0:
            chosen = "dpo"
    speaker = chosen or max(candidates, key=lambda name: (judged[name]["status"] == INCONCLUSIVE, report["scores"][name][metric]))
    return {
        "status": judged[speaker]["status"],
        "candidate": chosen,
        "reasons": [f"{speaker}: {reason}" for reason in judged[speaker]["reasons"]],
        "candidates": judged,
        "bound_to": report["bound_to"],
    }


def bound_versions(base: Artifact, sft: Artifact, dpo: Artifact, split: Artifact) -> dict[str, str]:
    """Return the identity of what is judged. The base's version covers its weights, tokenizer and template."""
    return {
        "base_model": base.data_version,
        "lora_adapter": sft.data_version,
        "dpo_adapter": dpo.data_version,
        "heldout": split.part_version("heldout"),
        "retention": split.part_version("retention"),
    }


def require_pass(report: Artifact | None, versions: Mapping[str, str], gate: GateSettings, where: str) -> dict[str, Any]:
    """Return the verdict if it is a PASS for exactly these versions (or overridden by config). Raises VerdictError."""
    if report is None:
        raise VerdictError(where, "there is no eval_report", "a PASS verdict", "materialize eval_report first")
    try:
        verify_files(report)
        numbers = json.loads((report.path / "report.json").read_text())
    except (ArtifactError, OSError, json.JSONDecodeError) as error:
        raise VerdictError(
            where, f"the eval_report cannot be trusted: {error}", "the report as it was written", "materialize eval_report again"
        ) from None
    verdict = decide(numbers, gate)
    for name in BOUND:
        if verdict["bound_to"].get(name) != versions[name]:
            raise VerdictError(
                where,
                f"the verdict is about another {name} ({verdict['bound_to'].get(name)}, now {versions[name]})",
                "a verdict about exactly these versions",
                "materialize eval_report again",
            )
    if verdict["status"] != PASS:
        if gate.override:
            best = verdict["candidate"] or max(
                (name for name in ("sft", "dpo") if name in numbers["scores"]), key=lambda name: numbers["scores"][name][numbers["metric"]]
            )
            return {**verdict, "candidate": best, "override": gate.override}
        raise VerdictError(
            where,
            f"the verdict is {verdict['status']}: {'; '.join(verdict['reasons'])}",
            PASS,
            "see eval_report for what to try; gate.override takes a written reason and is recorded",
        )
    return verdict
