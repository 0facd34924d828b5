"""What a training would take of the GPU, before it is started: the memory plan over the rows of today, for `ft plan`. No torch."""

import math
import shutil
import subprocess
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import Project
from ft_assets.config.launcher import AccelerateSettings, AnyLauncher, KubernetesSettings, LocalSettings, RaySettings, SlurmSettings
from ft_assets.errors import ConfigError, MemoryPlanError
from ft_assets.launchers.accelerate import ranks_of
from ft_assets.training.flops import peak_flops
from ft_assets.training.plan import Data, Machine, make_plan
from ft_assets.training.shape import snapshot_shape

TRAINING = {"lora_adapter": ("train", "sft"), "dpo_adapter": ("preferences", "dpo")}


def forecast(project: Project, store: ArtifactStore, asset: str, partition: str | None) -> tuple[float | None, str | None]:
    """Return (predicted peak of a rank in GB, the first line of a refusal).

    (None, None) for what does not train, and where nothing is known of the GPU: without one here, and on a cluster unless
    `memory_limit_gb` says what its GPUs have.
    """
    base, split = (store.current(name, partition) if asset in TRAINING else None for name in ("base_model", "heldout_split"))
    if base is None or split is None or partition is None:
        return None, None
    here = isinstance(project.launcher, LocalSettings | AccelerateSettings)
    gpu = _gpu() if here else ("", math.inf) if project.memory_limit_gb and _on_gpus(project.launcher) else None
    if gpu is None:
        return None, None
    part, key = TRAINING[asset]
    lengths = _lengths(split.path / f"{part}.parquet", key)
    if not lengths:
        return None, None
    recipe, (name, free) = project.recipe(partition), gpu
    memory = min(free, (project.memory_limit_gb or math.inf) * 1e9)
    pairs = key == "dpo"
    data = Data(lengths, not pairs and recipe.sft.packing is not False, 2 if pairs else 1, reference=pairs, plain=pairs)
    try:
        plan = make_plan(
            snapshot_shape(base.path),
            recipe.lora,
            recipe.dpo if pairs else recipe.sft,
            data,
            Machine(True, memory, 2, True, peak_flops(name), *_ranks(project.launcher)),
            key,
        )
    except MemoryPlanError as error:
        return None, error.found
    except ConfigError as error:
        return None, f"{error.where}: {error.found}; expected {error.expected}"
    return round(plan.predicted / 1e9, 1), None


def _lengths(path: Path, key: str) -> list[int]:
    def of(name: str) -> list[int]:
        return pc.call_function("list_value_length", [pq.read_table(path, columns=[name])[name]]).to_pylist()

    if key == "sft":
        return of("input_ids")
    return [
        prompt + max(chosen, rejected)
        for prompt, chosen, rejected in zip(of("prompt_ids"), of("chosen_ids"), of("rejected_ids"), strict=True)
    ]


def _ranks(launcher: AnyLauncher) -> tuple[int, str]:
    """Return how many ranks a training has, and whether they may divide the base. Raises ConfigError."""
    match launcher:
        case AccelerateSettings():
            return ranks_of(launcher), launcher.sharding
        case RaySettings():
            return launcher.workers, "ddp"
        case SlurmSettings():
            return launcher.nodes * launcher.ranks_per_node, "ddp"
        case KubernetesSettings():
            return max(1, launcher.gpus), "ddp"
        case _:
            return 1, "ddp"


def _on_gpus(launcher: AnyLauncher) -> bool:
    """Return whether a cluster's launcher asks for GPUs."""
    match launcher:
        case RaySettings():
            return launcher.use_gpu
        case SlurmSettings():
            return bool(launcher.gpus or launcher.gres)
        case KubernetesSettings():
            return launcher.gpus > 0
        case _:
            return False


def _gpu() -> tuple[str, float] | None:
    """Return the first GPU's name and free memory in bytes, as nvidia-smi says; None if none answers."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    name, _, free = lines[0].rpartition(",")
    return name.strip(), float(free) * 2**20
