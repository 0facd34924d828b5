"""Pictures for the UI and the report: matplotlib, imported when one is drawn."""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_assets.evaluation.report_model import EvalReport

LABELS = {
    "base": "base",
    "few_shot": "base + few-shot prompt",
    "sft": "SFT adapter",
    "dpo": "SFT + DPO adapter",
    "rl": "SFT + RL adapter",
}
COLORS = {
    "base": "#9aa5b1",
    "few_shot": "#7b8794",
    "sft": "#2f855a",
    "dpo": "#276749",
    "rl": "#22543d",
}


def _axes(height: float = 2.4, columns: int = 1, lines: int = 1) -> tuple[Any, Any]:
    # Not pyplot: it takes most of a second to import and keeps every figure until it is closed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, height), dpi=90)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns)


def score_plot(report: EvalReport) -> bytes:
    """Draw the gate metric of each candidate with its interval, as PNG."""
    figure, axes = _axes()
    metric = report.metric
    names = list(report.scores)
    values = [report.scores[name][metric] for name in names]
    intervals = [report.intervals[name] for name in names]
    errors = [
        [value - low for value, (low, _) in zip(values, intervals, strict=True)],
        [high - value for value, (_, high) in zip(values, intervals, strict=True)],
    ]
    axes.barh(
        [LABELS[name] for name in names],
        values,
        xerr=errors,
        color=[COLORS[name] for name in names],
        capsize=3,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1 if report.higher_is_better(metric) else None)
    axes.set_xlabel(f"{metric} on {report.heldout_rows} held-out rows")
    return _png(figure)


def rival_plot(report: EvalReport) -> bytes:
    """Draw the gate metric of the rivals against price and latency, as PNG.

    The candidates are horizontal lines: what an answer of theirs costs depends on the machine. A
    rival whose price or latency is not known is a dotted one.
    """
    rivals, metric = report.rivals or {}, report.metric
    figure, axes = _axes(2.8, columns=2)
    costs = {name: rival.cost for name, rival in rivals.items()}
    sides: list[tuple[str, dict[str, float]]] = [
        (
            "price of a thousand answers",
            {n: c.per_thousand for n, c in costs.items() if c.per_thousand is not None},
        ),
        (
            "seconds an answer (median)",
            {n: c.seconds for n, c in costs.items() if c.seconds is not None},
        ),
    ]
    for axis, (label, places) in zip(axes, sides, strict=True):
        for name, place in places.items():
            value, (low, high) = rivals[name].scores[metric], rivals[name].interval
            error = [[max(value - low, 0)], [max(high - value, 0)]]
            axis.errorbar([place], [value], yerr=error, fmt="o", color="#c05621", capsize=3)
            axis.annotate(name, (place, value), (5, 4), textcoords="offset points", fontsize=8)
        for name in rivals.keys() - places.keys():  # it has a score, and no place
            value = rivals[name].scores[metric]
            axis.axhline(value, color="#c05621", linewidth=1, linestyle=":")
            where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
            axis.annotate(f"{name} (not known)", (0.99, value), fontsize=7, **where)
        for name, scores in report.scores.items():
            axis.axhline(scores[metric], color=COLORS[name], linewidth=1, label=LABELS[name])
        axis.set_xlim(0, 1.35 * max(places.values(), default=0) or 1)  # room for the names
        axis.margins(y=0.15)
        axis.set_xlabel(label if places else f"{label}: not known", fontsize=8)
    axes[0].set_ylabel(metric)
    shown = axes[0].get_legend_handles_labels()
    figure.legend(*shown, loc="upper center", ncols=4, fontsize=7, frameon=False)
    return _png(figure, top=0.92)


def outcome_plot(report: EvalReport, steps: list[tuple[str, str]]) -> bytes:
    """Draw the share of rows won, tied and lost of each comparison in the gate metric, as PNG."""
    figure, axes = _axes(0.8 + 0.36 * len(steps))
    n = report.heldout_rows
    for place, (name, rival) in enumerate(steps):
        entry, left = report.comparisons[name][rival][report.metric], 0.0
        for part, count, color in (
            ("wins", entry.wins, "#2f855a"),
            ("ties", entry.ties, "#d9dee3"),
            ("losses", entry.losses, "#c05621"),
        ):
            share = count / n
            axes.barh(place, share, left=left, color=color, label=part if place == 0 else None)
            if share > 0.06:
                axes.text(
                    left + share / 2,
                    place,
                    str(count),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="#222" if part == "ties" else "white",
                )
            left += share
    axes.set_yticks(
        range(len(steps)),
        [f"{LABELS[name]}\nagainst {LABELS[rival]}" for name, rival in steps],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"share of {n} held-out rows")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)
    return _png(figure)


def read_curve(adapter: Path, name: str) -> list[dict[str, float]]:
    """Read a curve of a training beside its adapter (`curve` or `validation`), [] if missing."""
    path = adapter / "info" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def curve_plot(
    curve: list[dict[str, float]], title: str, validation: list[dict[str, float]] | None = None
) -> bytes:
    """Draw the loss over optimizer steps, and that of the validation rows by epoch, as PNG."""
    figure, axes = _axes()
    axes.plot(
        [entry["step"] for entry in curve],
        [entry["loss"] for entry in curve],
        color="#2f855a",
        label="training batch",
    )
    if validation:
        points = (
            [entry["step"] for entry in validation],
            [entry["validation_loss"] for entry in validation],
        )
        axes.plot(*points, color="#c05621", marker="o", label="validation rows")
        axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats/token)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return _png(figure)


VALIDATION_OF_RL = {"reward": "validation_reward", "answer_tokens": "validation_tokens"}
CURVES_OF_RL = (("reward", "reward"), ("kl", "KL (nats/token)"), ("entropy", "entropy (nats)"))


def rl_plot(curve: list[dict[str, float]], validation: list[dict[str, float]]) -> bytes:
    """Draw reward, KL divergence, entropy and length of answers over optimizer steps, as PNG."""
    figure, axes = _axes(4.4, 2, 2)
    steps = [entry["step"] for entry in curve]
    panels = (*CURVES_OF_RL, ("answer_tokens", "tokens of an answer"))
    for panel, (key, label) in zip(axes.flat, panels, strict=True):
        panel.plot(steps, [entry[key] for entry in curve], color="#2f855a", label="samples")
        points = [
            (entry["step"], entry[name])
            for entry in validation
            if (name := VALIDATION_OF_RL.get(key, "")) in entry
        ]
        if points:
            panel.plot(*zip(*points, strict=True), "o-", color="#c05621", label="validation rows")
            panel.legend(fontsize=7, frameon=False)
        panel.set_title(label, fontsize=9)
        panel.grid(alpha=0.3)
    return _png(figure)


def _png(figure: Any, top: float = 1.0) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """Return a PNG for an image in the markdown of the UI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def length_plot(histogram: Mapping[str, Any], max_length: int) -> bytes:
    """Draw the lengths of the conversations in tokens, and the filter at max_length, as PNG."""
    figure, axes = _axes()
    edges, counts = histogram["edges"], histogram["counts"]
    axes.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge", color="#2f855a")
    axes.axvline(max_length, color="#c05621", linestyle="--", label=f"chat.max_length {max_length}")
    axes.set_xlabel("tokens of a conversation")
    axes.set_ylabel("conversations")
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def leaderboard_plot(ranked: list[dict[str, Any]]) -> bytes:
    """Draw each base model before and after, with intervals, as PNG.

    ranked: judged entries of evaluation/leaderboard.py.
    """
    figure, axes = _axes(1.0 + 0.55 * len(ranked))
    for place, entry in enumerate(ranked):
        for key, interval, offset, color in (
            ("base", "base_interval", 0.2, COLORS["base"]),
            ("score", "interval", -0.2, COLORS["sft"]),
        ):
            low, high = entry[interval]
            error = [[entry[key] - low], [high - entry[key]]]
            label = ("base" if key == "base" else "fine-tuned") if place == 0 else None
            axes.barh(
                place + offset, entry[key], 0.36, xerr=error, color=color, capsize=3, label=label
            )
    axes.set_yticks(
        range(len(ranked)), [f"{entry['name']}\n{entry['verdict']}" for entry in ranked], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel(f"{ranked[0]['metric']} on {ranked[0]['heldout_rows']} held-out rows")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)
    return _png(figure)
