"""The rows of the leaderboard, one for each base model, and their table. No torch.

Only reports on the same held-out rows can be ranked. A report on other rows is shown apart, a base
model without a report with the reason. Each ranked base model is a chance of a false winner, so
p-values are corrected over all of them. Not here: reading the store (assets/leaderboard.py).
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from ft_assets import markdown
from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.evaluation.report_model import Difference, EvalReport
from ft_assets.evaluation.scored_rows import ScoredRow
from ft_assets.evaluation.verdict.decision import PASS, adjusted_p, beats, decide, quality
from ft_assets.evaluation.verdict.holm import holm
from ft_assets.metrics import higher_is_better

Entry = dict[str, Any]
HEADER = (
    *("#", "base model", "verdict", "score", "interval", "base", "few-shot", "gain"),
    *("general loss", "general task", "GB in training", "GPU-seconds"),
    *("tokens/s trained", "tokens/s answered", "size", "serves"),
)


def judged_entry(
    name: str,
    report: EvalReport,
    gate: GateSettings,
    rows: Sequence[str],
    costs: Mapping[str, Any],
    serves: str,
    stale: str | None = None,
) -> Entry:
    """Return the row of a base model that has a report.

    rows: the ids of its held-out rows. costs: memory_gb, gpu_seconds, train_tokens_per_s,
    answer_tokens_per_s and bytes, None if not known. serves: the released model. stale: the inputs
    that changed since the report.
    """
    verdict, metric = decide(report, gate), report.metric
    best = verdict.reported_candidate
    gain, general = report.comparisons[best]["base"][metric], report.retention
    against = general.comparisons[best]["base"] if general else None
    return {
        "name": name,
        "verdict": verdict.status,
        "candidate": best,
        "reason": "; ".join(verdict.reasons),
        "metric": metric,
        "score": report.scores[best][metric],
        "interval": list(report.intervals[best]),
        "base": report.scores["base"][metric],
        "base_interval": list(report.intervals["base"]),
        "few_shot": report.scores.get("few_shot", {}).get(metric),
        "gain": {"mean": gain.mean, "low": gain.low, "high": gain.high},
        "general_loss_rise": -against["loss"].mean if against else None,
        "general_task": {"metric": general.metric, "change": against[general.metric].mean}
        if general and against
        else None,
        "heldout_rows": len(rows),
        "heldout_ids": sorted(rows),
        "confidence": report.confidence,
        "against_base": {
            candidate: rivals["base"] for candidate, rivals in report.comparisons.items()
        },
        "serves": serves,
        "stale": stale,
        **costs,
        **({"lower_is_better": True} if metric in (report.lower_is_better or ()) else {}),
    }


def failed_entry(name: str, reason: str) -> Entry:
    """Return the row of a base model without a report."""
    return {"name": name, "verdict": None, "reason": reason}


def rank(entries: Sequence[Entry], gate: GateSettings) -> list[Entry]:
    """Return the entries with their "rank", best first.

    The rank is None without a report, with a stale one, or with one on other rows or by another
    metric than most have; "apart" has the reason. "chance" has the reason why a PASS is not proven
    among all ranked base models.
    """
    judged = [entry for entry in entries if entry["verdict"]]
    kinds = [(entry["metric"], tuple(entry["heldout_ids"])) for entry in judged]
    fresh = [kind for entry, kind in zip(judged, kinds, strict=True) if not entry["stale"]]
    usual = max(fresh, key=fresh.count, default=None)
    shared, apart = [], []
    for entry, kind in zip(judged, kinds, strict=True):
        (shared if kind == usual and not entry["stale"] else apart).append(entry)
    lower = any(entry.get("lower_is_better") for entry in shared)
    sign = 1 if lower or (usual and not higher_is_better(usual[0])) else -1
    shared.sort(key=lambda entry: (sign * entry["score"], entry["name"]))
    chances = _unproven_among_all(shared, gate)
    placed = [
        {**entry, "rank": place, "apart": None, "chance": chances.get(entry["name"])}
        for place, entry in enumerate(shared, 1)
    ]
    placed += [{**entry, "rank": None, "apart": _why_apart(entry, usual)} for entry in apart]
    placed += [{**entry, "rank": None, "apart": None} for entry in entries if not entry["verdict"]]
    internal = ("heldout_ids", "against_base")
    return [{key: value for key, value in entry.items() if key not in internal} for entry in placed]


def _unproven_among_all(ranked: Sequence[Entry], gate: GateSettings) -> dict[str, str]:
    """Return {name: reason} of each PASS that is not proven by p-values over all base models."""
    if len(ranked) < 2:
        return {}
    metric = ranked[0]["metric"]
    against = {
        f"{entry['name']} {candidate}": differences
        for entry in ranked
        for candidate, differences in entry["against_base"].items()
    }
    adjusted = adjusted_p(against, metric, gate)
    found = {}
    for entry in ranked:
        key = f"{entry['name']} {entry['candidate']}"
        among_all = quality(against[key], metric, gate, adjusted[key], entry["confidence"])
        if entry["verdict"] == PASS and not among_all.passed:
            p = min(adjusted[key].values(), default=1.0)
            found[entry["name"]] = (
                f"PASS on its own, not among the {len(ranked)} base models on these rows: "
                f"Holm's p over all of them is {p:.2g}"
            )
    return found


def winner(
    ranked: Sequence[Entry],
    rows: Sequence[Sequence[ScoredRow]],
    settings: EvaluationSettings,
) -> str:
    """Return the sentence that tells whether the first is proven better than the others.

    ranked: the entries with a rank, best first. rows: the scored rows of their candidates, in the
    same order. The p-values are Holm's over all pairs, because the first was chosen by its score.
    """
    # Not at the top: scipy takes longer than the rest of a run with nothing to do.
    from ft_assets.evaluation.report import compare_rows

    if len(ranked) < 2:
        return ""
    first, metric = ranked[0], ranked[0]["metric"]
    confidence = max(entry["confidence"] for entry in ranked)
    of = {entry["name"]: its for entry, its in zip(ranked, rows, strict=True)}
    pairs: dict[tuple[str, str], Difference] = {
        (one, other): compare_rows(of[one], of[other], settings, confidence, {metric})[metric]
        for one, other in combinations(of, 2)
    }
    adjusted = holm({" ".join(pair): entry.p for pair, entry in pairs.items()})
    proven, unproven = [], []
    for other in list(of)[1:]:
        pair = (first["name"], other)
        p = adjusted[" ".join(pair)]
        text = pairs[pair].model_copy(update={"p": p}).describe(metric, other)
        (proven if beats(pairs[pair], confidence, p) else unproven).append(text)
    parts = [f"proven better: {'; '.join(proven)}"] if proven else []
    parts += [f"not proven better: {'; '.join(unproven)}"] if unproven else []
    corrected = f" (Holm's p over {len(pairs)} pairs)" if len(pairs) > 1 else ""
    return f"**{first['name']}** is first; {'; '.join(parts)}{corrected}."


def _why_apart(entry: Entry, usual: tuple[str, tuple[str, ...]] | None) -> str:
    if entry["stale"]:
        return (
            f"stale: its report is about another {entry['stale']}: "
            "not ranked until its eval_report is made again"
        )
    assert usual is not None, "an entry that is not stale has a kind"
    if entry["metric"] != usual[0]:
        return f"judged by {entry['metric']}, the others by {usual[0]}: not ranked"
    return (
        f"judged on {entry['heldout_rows']} other held-out rows: "
        "not ranked until its eval_report is made again"
    )


def table(ranked: Sequence[Entry], first: str = "") -> str:
    """Return the leaderboard as markdown: the sentence about the first, a table, and notes."""
    lines = [*([first, ""] if first else []), markdown.table(HEADER, map(_cells, ranked))]
    notes = [f"- **{entry['name']}**: {note}" for entry in ranked if (note := _note(entry))]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def _note(entry: Entry) -> str | None:
    if entry["verdict"] is None:
        return f"not judged: {entry['reason']}"
    if entry["apart"]:
        return entry["apart"]
    return entry["chance"] if entry["verdict"] == PASS else f"{entry['verdict']}: {entry['reason']}"


def _cells(entry: Entry) -> list[str]:
    if entry["verdict"] is None:
        return ["–", entry["name"], "not judged", *["–"] * (len(HEADER) - 3)]
    gain, task = entry["gain"], entry["general_task"]
    return [
        str(entry["rank"] or "–"),
        entry["name"],
        entry["verdict"],
        f"**{entry['score']:.3f}** {entry['metric']} ({entry['candidate']})",
        "[{:.3f}, {:.3f}]".format(*entry["interval"]),
        f"{entry['base']:.3f}",
        _number(entry["few_shot"]),
        f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]",
        _number(entry["general_loss_rise"], "+.3f"),
        f"{task['change']:+.3f} {task['metric']}" if task else "–",
        _number(entry["memory_gb"], ".2f"),
        _number(entry["gpu_seconds"], ".0f"),
        _number(entry["train_tokens_per_s"], ".0f"),
        _number(entry["answer_tokens_per_s"], ".0f"),
        f"{entry['bytes'] / 1e9:.2f} GB" if entry["bytes"] else "–",
        entry["serves"],
    ]


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)
