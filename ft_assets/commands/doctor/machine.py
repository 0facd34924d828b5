"""`ft doctor`, the machine: Python and libraries, GPU or CPU, bf16, bitsandbytes, disk."""

import importlib
import importlib.metadata
import os
import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_assets.commands.doctor.check import Check, fail, first_line, ok, warn
from ft_assets.commands.store_view import existing, free_bytes, in_bytes
from ft_assets.hardware import available_memory, first_gpu

PACKAGE = "ft_assets"
ENOUGH_MEMORY = 4e9  # the demo's peak is 3.9 GB
LEAST_DISK, ENOUGH_DISK = 1e9, 10e9


def _declared() -> tuple[str, list[str]]:
    """Return requires-python and the requirements, from pyproject.toml or the installed package."""
    file = Path(__file__).parents[3] / "pyproject.toml"
    if file.is_file():
        project: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == PACKAGE:
            return project["requires-python"], project["dependencies"]
    needed = importlib.metadata.requires(PACKAGE) or []
    return importlib.metadata.metadata(PACKAGE)["Requires-Python"], [
        line for line in needed if "extra ==" not in line
    ]


def libraries() -> Iterator[Check]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, needed = _declared()
    version = platform.python_version()
    inside = SpecifierSet(python).contains(version, prereleases=True)
    yield (
        ok("python", version)
        if inside
        else fail("python", version, f"use Python {python}: make a new environment with it")
    )
    right = 0
    for line in needed:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield fail(requirement.name, "is not installed", f"pip install '{wanted}'")
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            right += 1
        else:
            yield fail(
                requirement.name,
                f"{installed} is outside {requirement.specifier}",
                f"pip install '{wanted}'",
            )
    yield ok("libraries", f"{right} in the ranges of pyproject.toml")


def compute() -> Iterator[Check]:
    """The GPU, or what there is instead; and in which numbers it computes."""
    import torch

    if torch.cuda.is_available():
        driver = gpu.driver if (gpu := first_gpu()) else "unknown"
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found = (
                f"{torch.cuda.get_device_name(index)}, {in_bytes(free)} of {in_bytes(total)} free, "
                f"driver {driver}, torch {torch.__version__}"
            )
            if free < total / 2:
                yield warn(
                    f"gpu {index}",
                    found,
                    "another process uses much of it (see nvidia-smi): training may run out of "
                    "memory",
                )
            else:
                yield ok(f"gpu {index}", found)
    elif gpu := first_gpu():
        built = torch.version.cuda or "no CUDA"
        yield warn(
            "gpu",
            f"there is one (driver {gpu.driver}), but torch {torch.__version__} ({built}) does "
            "not see it",
            "install a torch that is built for this driver's CUDA; look at CUDA_VISIBLE_DEVICES",
        )
    yield _processors(torch.cuda.is_available())
    yield from _numbers(torch)


def _processors(has_gpu: bool) -> Check:
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    memory = available_memory()
    found = f"{count} cores, " + (
        f"{in_bytes(memory)} of memory available" if memory is not None else "memory unknown"
    )
    found += "" if has_gpu else "; no GPU: fit for models below about 1B"
    if memory is not None and memory < ENOUGH_MEMORY:
        return warn(
            "cpu", found, f"free some memory: training a 135M model takes {in_bytes(ENOUGH_MEMORY)}"
        )
    return ok("cpu", found)


def _numbers(torch: Any) -> Iterator[Check]:
    from ft_assets.hardware import compute_dtype

    chosen = str(compute_dtype()).removeprefix("torch.")
    if not torch.cuda.is_available():
        faster = (
            "bf16 is as fast as fp32 here"
            if chosen == "bfloat16"
            else "bf16 matrix products are slower than fp32 on this CPU"
        )
        yield ok("bf16", f"computes in {chosen}: {faster}")
    elif torch.cuda.get_device_capability()[0] < 8:
        yield warn(
            "bf16",
            f"computes in {chosen}, which this GPU only emulates",
            "expect it to be slow: bf16 wants compute capability 8.0",
        )
    else:
        yield ok("bf16", f"computes in {chosen}")


def bitsandbytes(needed: bool) -> Iterator[Check]:
    """Check whether QLoRA works. Without bitsandbytes, fail if `needed`, and otherwise warn."""
    try:
        module = importlib.import_module("bitsandbytes")
    except Exception as error:  # its own loading of CUDA libraries raises many kinds
        advice = "pip install bitsandbytes; without it lora.method must be lora"
        yield (fail if needed else warn)(
            "bitsandbytes", f"cannot be imported ({first_line(error)})", advice
        )
        return
    yield ok("bitsandbytes", f"{module.__version__}{'' if needed else ' (for lora.method: qlora)'}")


def disk(store: Path) -> Iterator[Check]:
    place, free = existing(store), free_bytes(store)
    found, advice = (
        f"{in_bytes(free)} free at {store}",
        "ft gc removes old versions; or set store: to another disk",
    )
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield fail(
            "disk",
            f"{place} cannot be written to",
            "get write permission, or set store: to another folder",
        )
    elif free < LEAST_DISK:
        yield fail("disk", found, advice)
    elif free < ENOUGH_DISK:
        yield warn(
            "disk",
            found,
            f"a snapshot and a merged model take twice the base model's size in bf16; {advice}",
        )
    else:
        yield ok("disk", found)
