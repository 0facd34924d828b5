"""The rows of the leaderboard, one for each base model, and their table. No torch.

Only reports on the same held-out rows can be ranked. A report on other rows is shown apart, a base
model without a report with the reason. Not here: reading the store (assets/leaderboard.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ft_assets import markdown
from ft_assets.config import GateSettings
from ft_assets.evaluation.report_model import EvalReport
from ft_assets.evaluation.verdict.decision import decide
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
        "serves": serves,
        "stale": stale,
        **costs,
        **({"lower_is_better": True} if metric in (report.lower_is_better or ()) else {}),
    }


def failed_entry(name: str, reason: str) -> Entry:
    """Return the row of a base model without a report."""
    return {"name": name, "verdict": None, "reason": reason}


def rank(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries with their "rank", best first.

    The rank is None without a report, with a stale one, or with one on other rows or by another
    metric than most have; "apart" has the reason.
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
    placed = [{**entry, "rank": place, "apart": None} for place, entry in enumerate(shared, 1)]
    placed += [{**entry, "rank": None, "apart": _why_apart(entry, usual)} for entry in apart]
    placed += [{**entry, "rank": None, "apart": None} for entry in entries if not entry["verdict"]]
    return [
        {key: value for key, value in entry.items() if key != "heldout_ids"} for entry in placed
    ]


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


def table(ranked: Sequence[Entry]) -> str:
    """Return the leaderboard as markdown: a table, and notes on models that are not ranked."""
    lines = [markdown.table(HEADER, map(_cells, ranked))]
    notes = [f"- **{entry['name']}**: {note}" for entry in ranked if (note := _note(entry))]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def _note(entry: Entry) -> str | None:
    if entry["verdict"] is None:
        return f"not judged: {entry['reason']}"
    if entry["apart"]:
        return entry["apart"]
    return None if entry["verdict"] == "PASS" else f"{entry['verdict']}: {entry['reason']}"


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
