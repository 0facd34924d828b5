"""This machine's GPUs, memory and number format. Importing the module does not import torch."""

import contextlib
import functools
import gc
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi reports it: memory in bytes."""

    name: str
    free: float
    total: float
    driver: str


FP8_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)


def no_fp8(name: str, capability: tuple[int, int]) -> str:
    """Return why a GPU has no FP8 products; "" if it has."""
    if capability >= FP8_CAPABILITY:
        return ""
    needed, found = (".".join(map(str, version)) for version in (FP8_CAPABILITY, capability))
    return f"{name} has compute capability {found}, and FP8 needs {needed} (Ada, Hopper) or more"


def first_gpu() -> Gpu | None:
    """Return the first GPU that nvidia-smi reports, or None if there is none."""
    fields = _nvidia_smi("name,memory.free,memory.total,driver_version")
    if fields is None:
        return None
    name, free, total, driver = (part.strip() for part in fields.rsplit(",", 3))
    return Gpu(name, float(free) * 2**20, float(total) * 2**20, driver)


def first_gpu_capability() -> tuple[int, int]:
    """Return the compute capability of the first GPU, e.g. (8, 9); (0, 0) if unknown."""
    found = re.fullmatch(r"(\d+)\.(\d+)", (_nvidia_smi("compute_cap") or "").strip())
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _nvidia_smi(query: str) -> str | None:
    """Return nvidia-smi's comma-separated answer for the first GPU; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return None if done.returncode or not lines else lines[0]


def available_memory() -> int | None:
    """Return the available bytes of main memory, or None if unknown.

    It is MemAvailable of /proc/meminfo.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None
    )


def peak_memory_gb() -> float:
    """Return the largest resident memory of this process so far, in GB (1e9 bytes)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@functools.cache
def compute_dtype() -> Any:
    """Return bfloat16 on a GPU, and on a CPU with AVX512-BF16 or AMX; else float32.

    Without them bf16 matrix products are some 20 times slower than fp32. The CPU's features decide,
    not a measurement: on a busy machine a measurement gave another result in the next process, and
    a resumed run ended with other weights.
    """
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16
    able = (
        getattr(torch.cpu, name, None)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return torch.bfloat16 if any(ask() for ask in able if ask) else torch.float32


def free_memory() -> float:
    """Return the free bytes of the device that `load_base` uses: the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    memory = available_memory()
    return 8e9 if memory is None else float(memory)


def free_unused() -> None:
    """Release the memory of models without references; torch would keep a GPU's memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, without importing torch.

    They come from CUDA_VISIBLE_DEVICES, or else from NVIDIA's device files.
    """
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        return names[: names.index("-1")] if "-1" in names else names
    numbers = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return sorted((number for number in numbers if number.isdigit()), key=int)


def boot_id() -> str:
    """Return the kernel's id of this boot; "" where there is none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def process_namespace() -> str:
    """Return the name of the namespace that this process's pids belong to, e.g. a container's."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def process_start(pid: int) -> int | None:
    """Return the start of a process in clock ticks; None if it has ended, also as a zombie."""
    try:
        # The name in parentheses may hold anything; what follows are the fields from 3 on: 3 is the
        # state, 22 the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
