"""What a training would take of the GPU, before it is started: the memory plan over the rows of today, for `ft plan`. No torch."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import Project
from ft_assets.errors import ConfigError, MemoryPlanError
from ft_assets.hardware import Gpu, first_gpu
from ft_assets.training.flops import peak_flops
from ft_assets.training.memory_plan.model_shape import snapshot_shape
from ft_assets.training.memory_plan.plan import Data, Machine, make_plan

TRAINING = {"lora_adapter": ("train", "sft"), "dpo_adapter": ("preferences", "dpo")}


@dataclass(frozen=True)
class Forecast:
    """Predicted peak of a rank in GB; the first line of a refusal; what else is to know. Nothing is known of what does not
    train, and where the GPU is not: without one here, and on a cluster unless `memory_limit_gb` says what its GPUs have."""

    peak_gb: float | None = None
    refused: str | None = None
    note: str | None = None


def forecast(project: Project, store: ArtifactStore, asset: str, partition: str | None) -> Forecast:
    """Return what the memory plan would say of a training on the GPU that it would find: the whole of it, where only another step of
    ours holds it now (the pool makes this one wait)."""
    base, split = (
        store.current(name, partition) if asset in TRAINING else None
        for name in ("base_model", "heldout_split")
    )
    if base is None or split is None or partition is None:
        return Forecast()
    gpu = _gpu(project)
    if gpu is None:
        return Forecast()
    part, key = TRAINING[asset]
    lengths = _lengths(split.path / f"{part}.parquet", key)
    if not lengths:
        return Forecast()
    recipe = project.recipe(partition)
    pairs = key == "dpo"
    data = Data(
        lengths,
        not pairs and recipe.sft.packing is not False,
        2 if pairs else 1,
        reference=pairs,
        plain=pairs,
    )
    shape, settings = snapshot_shape(base.path), recipe.dpo if pairs else recipe.sft

    def peak(memory: float) -> float:
        memory = min(memory, (project.memory_limit_gb or math.inf) * 1e9)
        launcher = project.launcher
        ranks, sharding = launcher.ranks(), launcher.sharding_mode()
        machine = Machine(True, memory, 2, True, peak_flops(gpu.name), ranks, sharding)
        return round(make_plan(shape, recipe.lora, settings, data, machine, key).predicted / 1e9, 1)

    try:
        with contextlib.suppress(MemoryPlanError):
            return Forecast(peak(gpu.free))
        return Forecast(
            peak(gpu.total),
            note=f"only {gpu.free / 1e9:.1f} of the GPU's {gpu.total / 1e9:.1f} GB are free now",
        )
    except MemoryPlanError as error:
        return Forecast(refused=error.found)
    except ConfigError as error:
        return Forecast(refused=f"{error.where}: {error.found}; expected {error.expected}")


def _lengths(path: Path, key: str) -> list[int]:
    def of(name: str) -> list[int]:
        return pc.call_function(
            "list_value_length", [pq.read_table(path, columns=[name])[name]]
        ).to_pylist()

    if key == "sft":
        return of("input_ids")
    return [
        prompt + max(chosen, rejected)
        for prompt, chosen, rejected in zip(
            of("prompt_ids"), of("chosen_ids"), of("rejected_ids"), strict=True
        )
    ]


def _gpu(project: Project) -> Gpu | None:
    """Return the GPU that a training step gets, with unlimited memory if it is on a cluster.

    None without a GPU, and on a cluster without `memory_limit_gb`: then the memory is unknown.
    """
    if project.launcher.on_this_machine:
        return first_gpu()
    if project.memory_limit_gb and project.launcher.on_gpu():
        return Gpu("", math.inf, math.inf, "")
    return None
