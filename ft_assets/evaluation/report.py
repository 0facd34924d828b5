"""The report: numbers as data, and as markdown that a person reads in the Dagster UI."""

import json
import statistics
from typing import Any

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.evaluation.plots import LABELS
from ft_assets.evaluation.statistics import compare, interval

Rows = dict[str, list[dict[str, Any]]]


def summarise(
    rows: Rows, losses: dict[str, list[float]], settings: EvaluationSettings, gate: GateSettings, bound_to: dict[str, str]
) -> dict[str, Any]:
    """Return the report's numbers. Raises KeyError if settings.metric is not a metric of the rows."""
    names = list(rows)
    metrics = [key for key in rows["base"][0] if key not in ("answer", "stopped", "tokens")]
    scores, intervals = {}, {}
    for name in names:
        values = {metric: [row[metric] for row in rows[name]] for metric in metrics}
        scores[name] = {metric: statistics.fmean(column) for metric, column in values.items()}
        scores[name]["stop_rate"] = statistics.fmean(float(row["stopped"]) for row in rows[name])
        scores[name]["mean_tokens"] = statistics.fmean(row["tokens"] for row in rows[name])
        intervals[name] = interval(values[settings.metric], gate.confidence, settings.seed)
    comparisons = {
        name: {
            rival: {
                metric: compare([row[metric] for row in rows[name]], [row[metric] for row in rows[rival]], gate.confidence, settings.seed)
                for metric in metrics
            }
            for rival in names
            if rival != name
        }
        for name in names
        if name in ("sft", "dpo")
    }
    retention = {
        name: compare(losses[name], losses["base"], gate.confidence, settings.seed) if name in losses else None for name in comparisons
    }
    return {
        "metric": settings.metric,
        "heldout_rows": len(rows["base"]),
        "scores": scores,
        "intervals": intervals,
        "comparisons": comparisons,
        "retention": retention,
        "retention_loss": {name: statistics.fmean(values) for name, values in losses.items()},
        "bound_to": bound_to,
    }


def markdown(report: dict[str, Any], verdict: dict[str, Any], rows: Rows, heldout: list[dict[str, Any]], partition: str) -> str:
    """Return the report as markdown: verdict on top, the table, then the rows that changed most."""
    metric, names = report["metric"], list(report["scores"])
    columns = [metric, *[name for name in report["scores"]["base"] if name not in (metric, "mean_tokens")]]
    lines = [f"# {partition}: {verdict['status']}", ""]
    lines += [f"- {reason}" for reason in verdict["reasons"]]
    lines.append(f"- to merge: **{LABELS[verdict['candidate']]}**" if verdict["candidate"] else "- nothing is merged")
    if "few_shot" in names:
        lines.append(f"- {_rival(report)}")
    lines += [
        "",
        f"## Scores on {report['heldout_rows']} held-out rows",
        "",
        f"| candidate | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name in names:
        low, high = report["intervals"][name]
        cells = [f"**{report['scores'][name][metric]:.3f}** [{low:.3f}, {high:.3f}]"] + [
            f"{report['scores'][name][column]:.3f}" for column in columns[1:]
        ]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Which step helped",
        "",
        "| step | difference | interval | wins / ties / losses | McNemar p |",
        "|---|---|---|---|---|",
    ]
    for name, rival in _steps(report):
        entry = report["comparisons"][name][rival][metric]
        p = "–" if entry["p_mcnemar"] is None else f"{entry['p_mcnemar']:.2g}"
        lines.append(
            f"| {LABELS[name]} against {LABELS[rival]} | {entry['mean']:+.3f} | [{entry['low']:+.3f}, {entry['high']:+.3f}] | {entry['wins']} / {entry['ties']} / {entry['losses']} | {p} |"
        )
    if report["retention_loss"]:
        lines += [
            "",
            "## General prompts (retention): loss in nats a token",
            "",
            "| candidate | loss | change | interval |",
            "|---|---|---|---|",
        ]
        for name, loss in report["retention_loss"].items():
            entry = report["retention"].get(name)
            change = f"{entry['mean']:+.3f} | [{entry['low']:+.3f}, {entry['high']:+.3f}]" if entry else "– | –"
            lines.append(f"| {LABELS[name]} | {loss:.3f} | {change} |")
    best = verdict["candidate"] or "sft"
    lines += _examples(report, rows, heldout, best)
    return "\n".join(lines) + "\n"


def _rival(report: dict[str, Any]) -> str:
    metric = report["metric"]
    best = "dpo" if "dpo" in report["scores"] and report["scores"]["dpo"][metric] >= report["scores"]["sft"][metric] else "sft"
    entry = report["comparisons"][best]["few_shot"][metric]
    if entry["low"] > 0:
        return f"prompting does not reach it: {LABELS[best]} is {entry['mean']:+.3f} above the few-shot prompt [{entry['low']:+.3f}, {entry['high']:+.3f}]"
    return f"**you may not need this fine-tune**: against the few-shot prompt the difference is {entry['mean']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"


def _steps(report: dict[str, Any]) -> list[tuple[str, str]]:
    steps = [("sft", "base"), ("sft", "few_shot"), ("dpo", "sft"), ("dpo", "base")]
    return [(name, rival) for name, rival in steps if name in report["scores"] and rival in report["scores"]]


def _examples(report: dict[str, Any], rows: Rows, heldout: list[dict[str, Any]], best: str) -> list[str]:
    metric = report["metric"]
    order = sorted(range(len(heldout)), key=lambda index: rows[best][index][metric] - rows["base"][index][metric])
    lines: list[str] = []
    for title, chosen in (("Gains", order[::-1][:3]), ("Misses", [index for index in order if rows[best][index][metric] < 1][:5])):
        lines += ["", f"## {title}", ""]
        for index in chosen:
            lines.append(f"> {_cell(heldout[index]['messages'][-2]['content'])}")
            lines.append("")
            lines.append(f"- reference: `{_cell(heldout[index]['messages'][-1]['content'])}`")
            lines += [f"- {LABELS[name]}: `{_cell(rows[name][index]['answer'])}`" for name in dict.fromkeys(("base", best))]
            lines.append("")
        if not chosen:
            lines.append("none")
    return lines


def _cell(text: str) -> str:
    text = " ".join(text.replace("`", "'").split())
    return text if len(text) <= 300 else text[:300] + " …"


def to_json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False)
