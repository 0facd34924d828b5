"""Leftovers of steps in the store: job folders, checkpoints, staging folders, deletions.

A folder is in use if a living process of this machine works with it, or if it was touched within a
day: a process of another machine that shares the disk is visible only through its files.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ft_assets.artifacts.disk import STAGED, TRASH
from ft_assets.job import Job

IDLE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Leftover:
    path: Path
    what: str
    why: str
    touched: float


def leftovers(root: Path, now: float) -> Iterator[Leftover]:
    """Yield the leftovers that no step uses any more."""
    running = [job for job, alive in _jobs(root, now) if alive]
    busy = {path.resolve() for job in running for path in (job.work, job.checkpoints, job.output)}
    for path, what in _candidates(root):
        at = touched(path)
        if path.name.startswith(TRASH):
            yield Leftover(path, "an interrupted ft gc", "half deleted", at)
        elif (
            path.resolve() not in busy
            and now - at >= IDLE_SECONDS
            and not _staged_by_the_living(path)
        ):
            yield Leftover(path, what, "no run works with it", at)


def running_inputs(root: Path, now: float) -> set[Path]:
    """Return the inputs of steps in progress, which need not be current any more."""
    return {path for job, alive in _jobs(root, now) if alive for path in job.inputs.values()}


def _candidates(root: Path) -> Iterator[tuple[Path, str]]:
    for place, folders, files in os.walk(root):
        here = Path(place)
        if "manifest.json" in files or here == root / ".work":
            folders.clear()
            continue
        for name in [name for name in (*folders, *files) if name.startswith((TRASH, STAGED))]:
            yield here / name, f"staged {here.relative_to(root)}"
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    for path in sorted((root / ".work").glob("jobs/*")):
        yield path, f"job {path.name}"
    for path in sorted((root / ".work").glob("*/*/*")):
        if path.suffix == ".lease":
            yield path, f"lease of {path.parent.parent.name}[{path.parent.name}] {path.name[:8]}"
        elif path.is_dir() and path.parent.parent.name != "jobs":
            yield (
                path,
                f"checkpoints of {path.parent.parent.name}[{path.parent.name}] {path.name[:8]}",
            )


def _jobs(root: Path, now: float) -> Iterator[tuple[Job, bool]]:
    """Yield the jobs with whether they may still run."""
    commands = list(_command_lines())
    for file in sorted((root / ".work").glob("jobs/*/job.json")):
        try:
            job = Job.model_validate_json(file.read_text())
        except (OSError, ValueError):
            continue
        named = os.fsencode(str(file))
        ended = (file.parent / "result.json").exists() or (file.parent / "error.json").exists()
        alive = any(named in command for command in commands)
        yield job, alive or (not ended and now - touched(file.parent) < IDLE_SECONDS)


def _command_lines() -> Iterator[bytes]:
    """Yield the command lines of this machine's processes; none without /proc."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield file.read_bytes()


def _staged_by_the_living(path: Path) -> bool:
    process = (
        path.name.removeprefix(STAGED).partition("-")[0] if path.name.startswith(STAGED) else ""
    )
    return process.isdigit() and Path("/proc", process).exists()


def touched(path: Path) -> float:
    """Return the last change of a file, or of a folder or anything in it, in seconds since 1970."""
    latest = 0.0
    with contextlib.suppress(OSError):
        latest = os.lstat(path).st_mtime
    for place, _, files in os.walk(path):
        for name in [place, *(os.path.join(place, file) for file in files)]:  # noqa: PTH118
            with contextlib.suppress(OSError):
                latest = max(latest, os.lstat(name).st_mtime)
    return latest
