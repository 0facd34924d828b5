"""Find overfitting in the loss curves of a training. Plain numbers, no torch."""

from collections.abc import Sequence
from typing import Any

PARTED = (
    0.05  # relative rise of the validation loss above its lowest, while the training loss falls
)


def up_to_kept(validation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the measurements up to the kept weights; all of them if none is marked."""
    kept = next(
        (index for index, entry in enumerate(validation) if entry.get("kept")), len(validation) - 1
    )
    return list(validation[: kept + 1])


def overfitting(
    curve: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]
) -> tuple[float | None, str]:
    """Return the relative rise of the validation loss, and a sentence about it.

    The rise is None unless the training loss falls while the validation loss rises.
    """
    trained = [entry for entry in validation if entry["step"] > 0]
    if not trained:
        return None, "no validation loss was measured"
    lowest, last = min(trained, key=lambda entry: entry["validation_loss"]), trained[-1]
    before = [entry["loss"] for entry in curve if entry["step"] <= lowest["step"]]
    after = [entry["loss"] for entry in curve if entry["step"] > lowest["step"]]
    rise = last["validation_loss"] / max(lowest["validation_loss"], 1e-6) - 1
    text = (
        f"validation loss {lowest['validation_loss']:.3f} at step {lowest['step']}, "
        f"{last['validation_loss']:.3f} at the last"
    )
    window = max(1, len(before) // 4)
    falls = bool(before and after) and sum(after) / len(after) < sum(before[-window:]) / window
    if rise <= PARTED or not falls:
        return None, text
    return (
        rise,
        f"{text}, while the training loss went on falling: "
        f"it overfits from step {lowest['step']} on",
    )
