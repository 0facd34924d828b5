"""Publish a preference or reinforcement training: its weights, curves, events, and plan."""

from pathlib import Path
from typing import Any

from ft_assets.training.adapter import require_finite
from ft_assets.training.memory_plan.plan import Plan
from ft_assets.training.method_choice import save_plan
from ft_assets.training.trackers import keep_events
from ft_assets.training.validation import Validation, save_result


def publish(
    key: str,
    model: Any,
    watch: Validation,
    curve: list[dict[str, float]],
    plan: Plan,
    checkpoints: Path,
    output: Path,
) -> None:
    """Write the kept weights and what was measured to `output`.

    `key`: the section of the settings. Raises TrainingError for a weight that is not finite.
    """
    require_finite(model, key)
    save_result(model, watch, curve, output)
    keep_events(checkpoints, output)
    save_plan(plan, output)
