"""Pictures for the UI and the report: matplotlib, imported when one is drawn."""

import base64
import io
from typing import Any

LABELS = {"base": "base", "few_shot": "base + few-shot prompt", "sft": "SFT adapter", "dpo": "SFT + DPO adapter"}


def score_plot(report: dict[str, Any]) -> bytes:
    """Return a PNG: the gate metric of each candidate with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, metric = list(report["scores"]), report["metric"]
    figure, axes = plt.subplots(figsize=(6, 2.4), dpi=90)
    values = [report["scores"][name][metric] for name in names]
    errors = [
        [value - report["intervals"][name][0] for name, value in zip(names, values, strict=True)],
        [report["intervals"][name][1] - value for name, value in zip(names, values, strict=True)],
    ]
    colors = ["#9aa5b1", "#7b8794", "#2f855a", "#276749"]
    axes.barh([LABELS[name] for name in names], values, xerr=errors, color=colors[: len(names)], capsize=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"{metric} on {report['heldout_rows']} held-out rows")
    return _png(figure)


def curve_plot(curve: list[dict[str, float]], title: str) -> bytes:
    """Return a PNG: the loss over optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.4), dpi=90)
    axes.plot([entry["step"] for entry in curve], [entry["loss"] for entry in curve], color="#2f855a")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return _png(figure)


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """Return a PNG for an image in the markdown of the UI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
