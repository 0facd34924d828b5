"""The user's program: it reads one answer, and its exit code is the score.

Each answer has a process of its own, with limits of time, memory and file size, an empty folder, a
cleared environment, and no network where Linux allows that without root. It is a fence against
mistakes and runaway code. It is no jail: the program can read what the user can read.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ft_assets.errors import EvaluationError
from ft_assets.metrics import sandbox
from ft_assets.metrics.registry import Metric
from ft_assets.rows.types import Message

PARALLEL = 4
LARGEST_FILE = 64 * 2**20
TAIL = 300  # characters of the program's errors in a message

Metric("program", binary=True, config="program", of_answer=False).register()


class ProgramSettings(BaseModel):
    """`evaluation.program`. The program gets {"answer", "reference", "messages"} on its stdin."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    command: list[str] = Field(
        min_length=1, description="The program and its arguments; files are beside finetune.yaml."
    )
    seconds: float = Field(default=5, gt=0, description="Time of one answer. Longer is a fail.")
    memory_mb: int = Field(default=512, ge=64, description="Address space of the process.")

    def files(self, root: Path) -> list[Path]:
        """Return the files of the project's folder that the command names."""
        places = (root / part for part in self.command if not Path(part).is_absolute())
        return [place.absolute() for place in places if place.is_file()]


@dataclass(frozen=True)
class Outcome:
    """The exit code (None: the time was over) and the end of what the program wrote to stderr."""

    code: int | None
    errors: str

    def __str__(self) -> str:
        if self.code is None:
            return "did not end in time"
        ended = f"was killed by signal {-self.code}" if self.code < 0 else f"exit code {self.code}"
        return f"{ended}: {self.errors}" if self.errors else ended


def program_scores(
    settings: ProgramSettings,
    root: Path,
    answers: Sequence[str],
    references: Sequence[str],
    conversations: Sequence[Sequence[Message]],
) -> list[float]:
    """Score 1 for each answer on which the program ends with exit code 0, else 0.

    Raises EvaluationError if the program cannot be started.
    """
    outcomes = program_outcomes(settings, root, answers, references, conversations)
    return [float(outcome.code == 0) for outcome in outcomes]


def program_outcomes(
    settings: ProgramSettings,
    root: Path,
    answers: Sequence[str],
    references: Sequence[str],
    conversations: Sequence[Sequence[Message]],
) -> list[Outcome]:
    """Run the program once for each answer. Raises EvaluationError if it cannot be started."""
    command = _found(settings, root)
    given = [
        json.dumps({"answer": answer, "reference": reference, "messages": list(messages)})
        for answer, reference, messages in zip(answers, references, conversations, strict=True)
    ]
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(lambda text: _run(settings, command, text), given))


def _found(settings: ProgramSettings, root: Path) -> list[str]:
    """Return the command with the paths of the project's files.

    Raises EvaluationError if it names no program.
    """
    inside = set(settings.files(root))
    # Not resolved: a link to an interpreter decides which packages it finds.
    places = [(part, (root / part).absolute()) for part in settings.command]
    command = [str(place) if place in inside else part for part, place in places]
    program = shutil.which(command[0])
    if program is None:
        raise EvaluationError(
            where="evaluation.program.command",
            found=f"{settings.command[0]} is no program that can be run",
            expected=f"an executable file in {root}, or a program on the PATH",
            fix="correct the name, or set the file's executable bit (chmod +x)",
        )
    return [program, *command[1:]]


def _run(settings: ProgramSettings, command: list[str], given: str) -> Outcome:
    limits = [settings.memory_mb * 2**20, math.ceil(settings.seconds) + 1, LARGEST_FILE]
    fenced = [sys.executable, "-I", str(sandbox.__file__), *map(str, limits), *command]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            fenced,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=folder,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": folder,
                "TMPDIR": folder,
                "LANG": "C.UTF-8",
                "PYTHONHASHSEED": "0",
            },
            start_new_session=True,
        )
        try:
            process.communicate(given.encode(), timeout=settings.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(None, "")
        finally:
            _end(process)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4 * TAIL))
        return Outcome(process.returncode, errors.read().decode(errors="replace").strip()[-TAIL:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program, and all processes that it started in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
