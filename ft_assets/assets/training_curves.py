"""The loss curves of an adapter: its plot, and the overfitting check of both training assets."""

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.evaluation.curves import overfitting
from ft_assets.evaluation.plots import curve_plot, data_uri, read_curve
from ft_assets.orchestration.materializer import WARN

FIRST = ("loss_first", "loss_last", "validation_loss", "reward_accuracy")  # on the asset's page


def loss_curve(artifact: Artifact, title: str) -> dict[str, dg.MarkdownMetadataValue]:
    """Plot training and validation loss. Empty if the step wrote no curve."""
    curve = read_curve(artifact.path, "curve")
    if not curve:
        return {}
    picture = curve_plot(curve, title, read_curve(artifact.path, "validation"))
    return {"loss_curve": dg.MetadataValue.md(f"![loss]({data_uri(picture)})")}


def overfitting_check(artifact: Artifact) -> dg.AssetCheckResult:
    """Warn if the training loss still falls while the validation loss is above its minimum."""
    curve, validation = (read_curve(artifact.path, name) for name in ("curve", "validation"))
    rise, text = overfitting(curve, validation)
    if "kept_step" in artifact.metrics:
        text += f"; kept: step {artifact.metrics['kept_step']}, {artifact.metrics['kept_why']}"
    return dg.AssetCheckResult(passed=rise is None, severity=WARN, description=text)
