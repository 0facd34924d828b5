"""The contract between the graph and a step.

A step gets one JSON file. It writes a directory, a result and a stream of progress. It can be run
by hand with the job file alone: `python -m ft_assets.steps.sft job.json`.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from ft_assets.errors import FtError, JobError
from ft_assets.redaction import redacted, remember_variables


@dataclass(frozen=True)
class Step:
    """A step as the launchers see it: the module in ft_assets/steps that runs it, and its needs.

    `gpu`: a cluster's launcher sends it to a GPU. `distributed`: it can run as several ranks.
    """

    name: str
    gpu: bool = False
    distributed: bool = False


class Job(BaseModel):
    """The input of a step.

    `inputs` are published artifacts (read only), `output` is an empty staging directory.
    `settings` are those of the step's own model, as JSON. `gpu` and `distributed`: see Step.
    """

    model_config = ConfigDict(frozen=True)

    step: str
    asset: str
    partition: str | None
    fingerprint: str
    settings: dict[str, JsonValue]
    inputs: dict[str, Path]
    output: Path
    checkpoints: Path
    work: Path
    gpu: bool = False
    distributed: bool = False

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a job file. Raises JobError."""
        try:
            job = cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise _wrong(str(file), f"cannot be read ({error.strerror})", "a job file") from None
        except ValidationError as error:
            raise _wrong(str(file), _first(error), "a job file as the launcher writes it") from None
        remember_variables(job.settings)
        return job

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
    def crash_file(self) -> Path:
        """The file with a line on an unexpected error; its stack trace is in the log."""
        return self.work / "crash.txt"

    @property
    def log_file(self) -> Path:
        return self.work / "log.txt"


class StepSettings(BaseModel):
    """The settings of one step: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    STEP: ClassVar[Step]

    @classmethod
    def of(cls, job: Job) -> Self:
        """Validate the settings of a job. Raises JobError that names the wrong one."""
        try:
            return cls.model_validate(job.settings)
        except ValidationError as error:
            where = f"settings of the step {job.step}"
            raise _wrong(
                where, _first(error), f"the fields of {cls.__module__}.{cls.__name__}"
            ) from None

    def to_json_dict(self) -> dict[str, JsonValue]:
        """Return the settings as JSON for a job file.

        Only the keys that were set: a file that a step writes from them keeps its layout.
        """
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _first(error: ValidationError) -> str:
    """Format the first problem of a validation: the key, and what is wrong with it."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    return f"{key}: {problem['msg']}" if key else problem["msg"]


def _wrong(where: str, found: str, expected: str) -> FtError:
    return JobError(where=where, found=found, expected=expected, fix="correct the job file")


@dataclass(frozen=True)
class StepResult:
    """The result of a step: numbers for the manifest, and the versions of named content parts."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)


Report = Callable[..., None]


class ProgressFile:
    """Append `{"time": …, "message": …, numbers}` lines to the job's progress file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, message: str, **numbers: float) -> None:
        line = json.dumps({"time": time.time(), "message": redacted(message), **numbers})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
