"""Predict a training's GPU memory for `ft plan`: the memory plan over today's rows. No torch."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.config import LoraSettings, Project, SftSettings, TrainSettings
from ft_assets.errors import ConfigError, MemoryPlanError
from ft_assets.hardware import Gpu, first_gpu, first_gpu_capability, no_fp8
from ft_assets.training.flops import peak_flops
from ft_assets.training.memory_plan.model_shape import snapshot_shape
from ft_assets.training.memory_plan.plan import Data, Machine, Plan, make_plan

# {asset: (asset with its rows, their table, section of finetune.yaml)}
TRAINING = {
    "text_adapter": ("text_dataset", "train", "text"),
    "lora_adapter": ("heldout_split", "train", "sft"),
    "dpo_adapter": ("heldout_split", "preferences", "dpo"),
    "rl_adapter": ("heldout_split", "train", "rl"),
}


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
    rows = TRAINING[asset][0] if asset in TRAINING else ""
    base, split = (
        store.current(name, partition) if rows else None for name in ("base_model", rows)
    )
    if base is None or split is None or partition is None:
        return Forecast()
    gpu = _gpu(project)
    if gpu is None:
        return Forecast()
    tables = _tables(project, store, split, asset, partition)
    plan = _planner(project, base, tables, asset, partition, gpu.name)
    if plan is None:
        return Forecast()
    try:
        with contextlib.suppress(MemoryPlanError):
            return Forecast(round(plan(gpu.free).predicted / 1e9, 1))
        return Forecast(
            round(plan(gpu.total).predicted / 1e9, 1),
            note=f"only {gpu.free / 1e9:.1f} of the GPU's {gpu.total / 1e9:.1f} GB are free now",
        )
    except MemoryPlanError as error:
        return Forecast(refused=error.found)
    except ConfigError as error:
        return Forecast(refused=f"{error.where}: {error.found}; expected {error.expected}")


def _tables(
    project: Project, store: ArtifactStore, split: Artifact, asset: str, partition: str
) -> list[Artifact]:
    """Return the artifacts whose rows a training reads, as far as they were made."""
    source = project.recipe(partition).dpo.pairs if asset == "dpo_adapter" else "given"
    sampled = None if source == "given" else store.current("sampled_preferences", partition)
    return [*([] if source == "sampled" else [split]), *([sampled] if sampled else [])]


def training_lengths(
    project: Project, store: ArtifactStore, asset: str, partition: str
) -> list[int]:
    """Return the tokens of each row of a training; of a pair, of its longer answer's."""
    rows, part, key = TRAINING[asset]
    split = store.current(rows, partition)
    tables = _tables(project, store, split, asset, partition) if split else []
    return [length for made in tables for length in _lengths(made.path / f"{part}.parquet", key)]


def settle_method(
    project: Project,
    base: Artifact,
    split: Artifact,
    name: str,
    documents: Artifact | None = None,
) -> LoraSettings:
    """Return `lora` with the method that `auto` chooses for SFT, for the fingerprint and the step.

    With `documents`, whose training SFT continues, it is the method that fits both.

    The size of the GPU decides, not what is free at the moment: the same machine chooses the same.
    `auto` stays if the memory of a cluster's GPU is unknown; the step then chooses. Without room
    for any method it is `lora`, which the step refuses.
    """
    lora = project.recipe(name).lora
    gpu = _gpu(project)
    if lora.method != "auto" or (gpu is None and not project.launcher.on_this_machine):
        return lora
    trainings = {"lora_adapter": split, **({"text_adapter": documents} if documents else {})}
    methods: set[str] = set()
    for asset, rows in trainings.items():
        if gpu and (plan := _planner(project, base, [rows], asset, name, gpu.name)):
            with contextlib.suppress(MemoryPlanError, ConfigError):
                methods.add(plan(gpu.total).method)
    method = "qlora" if "qlora" in methods else "lora"  # lora on a CPU
    return lora.model_copy(update={"method": method})


def _planner(
    project: Project,
    base: Artifact,
    tables: Sequence[Artifact],
    asset: str,
    partition: str,
    gpu: str,
) -> Callable[[float], Plan] | None:
    """Return the function that plans a training for a GPU's memory in bytes; None without rows."""
    _, part, key = TRAINING[asset]
    lengths = [length for made in tables for length in _lengths(made.path / f"{part}.parquet", key)]
    if not lengths:
        return None
    recipe = project.recipe(partition)
    pairs = key == "dpo"
    settings: TrainSettings = getattr(recipe, key)
    if key == "rl":  # the longest answer comes after the prompt
        lengths = [length + recipe.evaluation.max_new_tokens for length in lengths]
    data = Data(
        lengths,
        isinstance(settings, SftSettings) and settings.packing is not False,
        2 if pairs else 1,
        reference=pairs or key == "rl",
        plain=pairs or key == "rl",
    )
    shape = snapshot_shape(base.path)

    def plan(memory: float) -> Plan:
        memory = min(memory, (project.memory_limit_gb or math.inf) * 1e9)
        launcher = project.launcher
        ranks, sharding = launcher.ranks(), launcher.sharding_mode()
        fp8 = _no_fp8(project, recipe.lora, gpu)
        machine = Machine(True, memory, 2, True, peak_flops(gpu), ranks, sharding, fp8)
        return make_plan(shape, recipe.lora, settings, data, machine, key)

    return plan


def _no_fp8(project: Project, lora: LoraSettings, gpu: str) -> str:
    """Return why the training's GPU has no FP8 products; "" if it has.

    The GPU of a cluster is taken to have them if they are set. Its step refuses otherwise.
    """
    if lora.base_compute == "bf16":
        return "lora.base_compute is bf16"
    if project.launcher.on_this_machine:
        return no_fp8(gpu, first_gpu_capability())
    return "" if lora.base_compute == "fp8" else "the GPU of the cluster is not known"


def _lengths(path: Path, key: str) -> list[int]:
    def of(name: str) -> list[int]:
        return pc.call_function(
            "list_value_length", [pq.read_table(path, columns=[name])[name]]
        ).to_pylist()

    if key != "dpo":
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
