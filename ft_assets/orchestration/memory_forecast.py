"""Predict a training's GPU memory for `ft plan`: the memory plan over today's rows. No torch."""

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
    """The predicted peak of a rank in GB, the first line of a refusal, and a note.

    All are None for an asset that does not train, without a GPU on this machine, and on a cluster
    without `memory_limit_gb`.
    """

    peak_gb: float | None = None
    refused: str | None = None
    note: str | None = None


def forecast(project: Project, store: ArtifactStore, asset: str, partition: str | None) -> Forecast:
    """Predict the peak memory of a training run.

    Assume the full GPU if it is full now: another of our steps may use it, and the pool makes this
    one wait.
    """
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
