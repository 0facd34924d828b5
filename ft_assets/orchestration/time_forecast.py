"""Predict the time of a training, and the cost of a run, for `ft plan`. No torch."""

from collections.abc import Sequence
from dataclasses import replace

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import Project, TrainSettings
from ft_assets.config.launcher import AccelerateSettings
from ft_assets.errors import FtError, nearest
from ft_assets.hardware import visible_gpus
from ft_assets.orchestration.memory_forecast import TRAINING, training_lengths
from ft_assets.orchestration.run_plan import MAYBE, RUNS, PlannedStep
from ft_assets.training.flops import PEAKS, flops_per_token, peak_flops
from ft_assets.training.memory_plan.model_shape import snapshot_shape
from ft_assets.training.memory_plan.plan import HOST_SECONDS

# Of the GPU's peak. SFT of an 8B shape reached 39.6 % of an H100 under a cap of 24 GB and 50.5 % on
# the whole card (docs/training.md); smaller models and other cards were not measured.
SHARE = 0.4
WITH_REFERENCE = 1.5  # a preference method also has the forward pass of its reference: 6 of 4


def require_known(gpu: str) -> None:
    """Raise FtError for a GPU whose peak is not known."""
    if peak_flops(gpu) is None:
        raise FtError(
            where=f"--gpu {gpu}",
            found="is not a GPU whose peak is known",
            expected=f"one of {', '.join(PEAKS)}",
            fix=nearest(gpu, PEAKS, "choose the nearest one"),
        )


def training_seconds(
    project: Project, store: ArtifactStore, asset: str, partition: str, gpu: str
) -> float | None:
    """Return the seconds of a training on each rank's GPU of this name.

    It is the useful FLOPs of all tokens by SHARE of the peak, or what Python and kernel launches
    take at least, if that is longer: it is for small models. None for an asset that does not
    train or that generates answers, before its rows are made, and for a GPU that is not known.
    """
    peak, base = peak_flops(gpu), store.current("base_model", partition)
    if peak is None or base is None or asset not in TRAINING or TRAINING[asset][2] == "rl":
        return None
    key, recipe = TRAINING[asset][2], project.recipe(partition)
    lengths = training_lengths(project, store, asset, partition)
    if not lengths:
        return None
    settings: TrainSettings = getattr(recipe, key)
    rows = len(lengths) * settings.num_train_epochs
    if settings.max_steps > 0:
        rows = settings.max_steps * settings.effective_batch
    tokens = sum(lengths) / len(lengths) * rows
    shape, ranks = snapshot_shape(base.path), _ranks(project)
    flops = flops_per_token(shape, full=recipe.lora.method == "full")
    pairs = 2 * WITH_REFERENCE if key == "dpo" else 1
    micro_batches = rows / settings.effective_batch  # at least one for each optimizer step
    host = micro_batches * shape.layers * HOST_SECONDS[recipe.lora.method == "qlora"]
    return max(tokens * pairs * flops / (peak * SHARE * ranks), host)


def _ranks(project: Project) -> int:
    """Return the ranks of a training on GPUs that need not be those of this machine."""
    launcher = project.launcher
    if isinstance(launcher, AccelerateSettings):  # its ranks() refuses more than are here
        return launcher.processes or len(visible_gpus()) or 1
    return launcher.ranks()


def with_times(
    project: Project, store: ArtifactStore, steps: Sequence[PlannedStep], gpu: str
) -> list[PlannedStep]:
    """Return the steps, the trainings that would run with their predicted time."""
    return [
        replace(
            step,
            predicted_seconds=training_seconds(project, store, step.asset, step.partition, gpu),
        )
        if step.partition is not None and step.action in (RUNS, MAYBE)
        else step
        for step in steps
    ]


def outlook(steps: Sequence[PlannedStep], gpu: str, price: float | None) -> list[str]:
    """Return the lines below a plan: what is predicted, and what the run costs by it.

    `price`: of an hour. The time of a step that does not train is that of its last run.
    """
    working = [step for step in steps if step.action in (RUNS, MAYBE)]
    trainings = [step for step in working if step.asset in TRAINING]
    known = [step for step in trainings if step.predicted_seconds is not None]
    if not trainings:
        return []
    hours = sum(step.predicted_seconds or 0 for step in known) / 3600
    lines = [
        f"≈ {hours_of(hours)} of training on {gpu}, if it reaches {SHARE:.0%} of its peak "
        f"({', '.join(step.asset for step in known)})"
    ] * bool(known)
    if unknown := [step.asset for step in trainings if step.predicted_seconds is None]:
        lines.append(
            f"not predicted: {', '.join(unknown)} (SFT and DPO are, after ft run --until "
            "heldout_split)"
        )
    if price is not None and known:
        times = [
            step.predicted_seconds if step.predicted_seconds is not None else step.seconds
            for step in working
        ]
        total = sum(time for time in times if time is not None) / 3600
        never = sum(time is None for time in times)
        without = f"; without what was never timed: {never} of {len(times)} steps" if never else ""
        lines.append(f"≈ {total * price:.2f} at {price:g} an hour, for {hours_of(total)}{without}")
    return lines


def hours_of(hours: float) -> str:
    """Format a time: minutes below an hour and a half."""
    return f"{hours:.1f} h" if hours >= 1.5 else f"{hours * 60:.1f} min"
