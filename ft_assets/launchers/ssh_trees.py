"""What a step needs on another machine: its files by content, and its job with the paths there."""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

import ft_assets
from ft_assets.artifacts.manifest import MANIFEST, Manifest, file_sha256
from ft_assets.config.loading import CONFIG_NAME
from ft_assets.errors import ConfigError
from ft_assets.job import Job

PROJECT_BYTES = 20_000_000  # of the files of a project whose own code grades answers
HOST = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
OWN_CODE = ("python", "program", "lm_eval_path")  # keys of evaluation that name files


@dataclass
class Luggage:
    """The files of a job: {tree: {path: sha256}}, and where each content is on this machine."""

    trees: dict[str, dict[str, str]] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)

    def add(self, tree: str, path: str, file: Path, sha256: str | None = None) -> None:
        sha256 = sha256 or file_sha256(file)
        self.trees.setdefault(tree, {})[path] = sha256
        self.places[sha256] = file

    def bytes_of(self, hashes: list[str]) -> int:
        """Return the size of these contents."""
        return sum(self.places[one].stat().st_size for one in hashes)


def pack(job: Job) -> tuple[Luggage, dict[str, str]]:
    """Return the files that a job reads, and {path here: path in the job's folder there}.

    Raises ConfigError for a setting with a path whose files cannot be sent.
    """
    luggage, moved = Luggage(), dict[str, str]()
    for path, file in code_files().items():
        luggage.add("code", path, file)
    named = {str(path): f"inputs/{name}" for name, path in job.inputs.items()}
    for number, text in enumerate(sorted(set(_paths(job.settings)) - set(named))):
        named[text] = f"inputs/.{number}"
    for here, there in named.items():
        folder = Path(here)
        if folder.is_file():
            luggage.add(there, folder.name, folder)
            there = f"{there}/{folder.name}"
        elif (folder / MANIFEST).exists():
            manifest = Manifest.read(folder)
            for name, entry in manifest.files.items():
                luggage.add(there, name, folder / name, entry.sha256)
            luggage.add(there, MANIFEST, folder / MANIFEST)
        elif (folder / CONFIG_NAME).exists():
            _add_project(luggage, there, folder, job.settings)
        else:
            raise ConfigError(
                where=f"launcher: ssh, step {job.step}",
                found=f"it reads {folder}, which is neither an artifact nor the project",
                expected="a step whose files can be sent to the host",
                fix="run this asset with launcher: local",
            )
        moved[here] = there
    return luggage, moved


def code_files() -> dict[str, Path]:
    """Return the files of this package: the host runs the same code."""
    package = Path(ft_assets.__file__).parent
    return {
        f"ft_assets/{path.relative_to(package).as_posix()}": path
        for path in sorted(package.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    }


def _add_project(
    luggage: Luggage, tree: str, root: Path, settings: Mapping[str, JsonValue]
) -> None:
    """Add finetune.yaml, and the project's other files if its own code grades answers."""
    luggage.add(tree, CONFIG_NAME, root / CONFIG_NAME)
    evaluation = settings.get("evaluation")
    if not isinstance(evaluation, dict) or not any(evaluation.get(key) for key in OWN_CODE):
        return
    total = 0
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in name.parts):
            total += path.stat().st_size
            luggage.add(tree, name.as_posix(), path)
        if total > PROJECT_BYTES:
            raise ConfigError(
                where=f"launcher: ssh, {root}",
                found=f"more than {PROJECT_BYTES // 1_000_000} MB of files beside finetune.yaml",
                expected="a small project: its own code grades answers, and may read any of them",
                fix="move large files out of the folder, or set launcher: local",
            )


def _paths(value: JsonValue | Mapping[str, JsonValue]) -> Iterator[str]:
    """Yield each text in settings that is an absolute path of this machine."""
    if isinstance(value, str):
        if value.startswith("/") and len(value) < 4096 and Path(value).exists():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _paths(one)
    elif isinstance(value, list):
        for one in value:
            yield from _paths(one)


def _replaced(value: JsonValue, moved: Mapping[str, str]) -> JsonValue:
    if isinstance(value, str):
        return moved.get(value, value)
    if isinstance(value, dict):
        return {key: _replaced(one, moved) for key, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, moved) for one in value]
    return value


def job_there(job: Job, home: str, moved: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return the job with the paths that it has below `home`, the job's folder on the host."""
    absolute = {here: f"{home}/{there}" for here, there in moved.items()}
    whole = job.model_dump(mode="json")
    whole |= {name: f"{home}/{name}" for name in ("output", "checkpoints", "work")}
    return {key: _replaced(value, absolute) for key, value in whole.items()}


def job_id(job: Job, luggage: Luggage) -> str:
    """Return the name of a job by all that it reads: the same work has the same name."""
    facts = [job.step, job.asset, job.partition, job.fingerprint, job.settings, luggage.trees]
    text = json.dumps(facts, sort_keys=True)
    asset = re.sub("[^a-zA-Z0-9]", "-", job.asset)[:40]
    return f"{asset}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def lock() -> list[str]:
    """Return the exact versions of this package's libraries here, e.g. `torch==2.13.0`.

    Without local versions such as `+cpu`: the index of the host chooses its own build.
    """
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    waiting = [(text, {""}) for text in importlib.metadata.requires("ft_assets") or []]
    done = set[tuple[str, str]]()
    while waiting:
        text, extras = waiting.pop()
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({**HOST, "extra": extra}) for extra in extras):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        wanted = {"", *requirement.extras}
        if {(name, extra) for extra in wanted} <= done:
            continue
        done |= {(name, extra) for extra in wanted}
        try:
            there = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:  # e.g. of Linux only
            found.setdefault(name, str(requirement.specifier))
            continue
        found[name] = f"=={there.version.partition('+')[0]}"
        waiting += [(text, wanted) for text in there.requires or []]
    return [f"{name}{version}" for name, version in sorted(found.items())]
