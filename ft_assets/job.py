"""The contract between the graph and a step: one JSON file in, a directory, a result and a stream of progress out.

A step can be run by hand with the job file alone: `python -m ft_assets.steps.sft job.json`.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Job(BaseModel):
    """What a step gets. `inputs` are published artifacts (read only), `output` is an empty staging directory."""

    model_config = ConfigDict(frozen=True)

    step: str
    asset: str
    partition: str | None
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, Path]
    output: Path
    checkpoints: Path
    work: Path

    @property
    def progress_file(self) -> Path:
        return self.work / "progress.jsonl"

    @property
    def result_file(self) -> Path:
        return self.work / "result.json"

    @property
    def error_file(self) -> Path:
        return self.work / "error.json"

    @property
    def log_file(self) -> Path:
        return self.work / "log.txt"


@dataclass(frozen=True)
class StepResult:
    """What a step reports: numbers for the manifest, and the versions of named parts of its content."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)


Report = Callable[..., None]


class ProgressFile:
    """Appends `{"time": …, "message": …, numbers}` lines to the job's progress file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, message: str, **numbers: float) -> None:
        line = json.dumps({"time": time.time(), "message": message, **numbers})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
