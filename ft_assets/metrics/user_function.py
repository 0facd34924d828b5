"""The user's own metric: a Python function named in finetune.yaml, called once for each row.

It runs in a process of its own (user_function_worker.py), so that code that exits, hangs or
crashes ends with an error that names the row.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ft_assets.errors import EvaluationError
from ft_assets.metrics import user_function_worker
from ft_assets.metrics.registry import Metric
from ft_assets.rows.types import Message

Row = tuple[str, str, str, Sequence[Message]]  # its place, the answer, the reference, the prompt
IMPORT_FACTOR = 10  # the import of the module may take this many times the limit of a row
TAIL = 300


class UserMetric(BaseModel):
    """`evaluation.python` as a mapping."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    function: str = Field(description="module:function(answer, reference, messages) -> number.")
    higher_is_better: bool = Field(default=True, description="False if a lower number is better.")
    seconds: float = Field(
        default=60,
        gt=0,
        le=86_400,
        description="Time limit of a row. The import of the module may take ten times as long.",
    )

    @property
    def name(self) -> str:
        """The name of the metric: that of the function."""
        return self.function.partition(":")[2]

    def descriptor(self) -> Metric:
        """Return the descriptor of the metric."""
        return Metric(
            self.name,
            higher_is_better=self.higher_is_better,
            bounded=False,
            config="python",
            of_answer=False,
        )


class UserFunction:
    """The function of a user metric, in a process that starts with the first row and is kept."""

    def __init__(self, metric: UserMetric, root: Path) -> None:
        self.metric, self.root = metric, root
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        self._unread = b""

    def scores(self, rows: Sequence[Row]) -> list[float]:
        """Score each row.

        Raises EvaluationError with the place of the row if the function raises, does not return a
        finite number, takes too long or ends its process; or if it cannot be imported.
        """
        return [self._score(*row) for row in rows]

    def _score(self, place: str, answer: str, reference: str, messages: Sequence[Message]) -> float:
        process = self._started()
        line = json.dumps([answer, reference, list(messages)]) + "\n"
        assert process.stdin is not None
        where = f"{self._where}, row {place}"
        try:
            process.stdin.write(line.encode())
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(where) from None
        told = self._line(where, self.metric.seconds)
        if "problem" in told:
            raise EvaluationError(
                where=where,
                found=told["problem"],
                expected="a finite number",
                fix="correct the function",
            )
        return told["value"]

    @property
    def _where(self) -> str:
        return f"evaluation.python: {self.metric.function}"

    def _started(self) -> subprocess.Popen[bytes]:
        """Return the process, and start it if there is none. Raises EvaluationError."""
        if self._process is not None:
            return self._process
        worker = str(user_function_worker.__file__)
        self._process = subprocess.Popen(
            [sys.executable, "-P", worker, self.metric.function, str(self.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        weakref.finalize(self, _end, self._process)
        told = self._line(self._where, IMPORT_FACTOR * self.metric.seconds)
        if "problem" in told:
            raise EvaluationError(
                where=self._where,
                found=f"cannot be used: {told['problem']}",
                expected="a function of (answer, reference, messages) in a module beside "
                f"{self.root / 'finetune.yaml'}, or in an installed one",
                fix="correct the name or the module",
            )
        return self._process

    def _line(self, where: str, seconds: float) -> dict[str, Any]:
        """Return the next line of the process. Raises EvaluationError at the end of the time."""
        assert self._process is not None and self._process.stdout is not None
        out, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        waiting = select.poll()
        waiting.register(out, select.POLLIN)
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not waiting.poll(1000 * left):
                _end(self._process)
                raise EvaluationError(
                    where=where,
                    found=f"did not end within {seconds:g} s",
                    expected=f"a number within {self.metric.seconds:g} s for each row "
                    f"(and an import within {IMPORT_FACTOR * self.metric.seconds:g} s)",
                    fix="make it faster, or give it more time: "
                    f"python: {{function: {self.metric.function}, seconds: 600}}",
                )
            if not (part := os.read(out, 1 << 16)):
                raise self._ended(where)
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _ended(self, where: str) -> EvaluationError:
        """Return the error of a process that ended by itself."""
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()[-TAIL:]
        how = f"is killed by signal {-code}" if code < 0 else f"ends the process with code {code}"
        return EvaluationError(
            where=where,
            found=f"it {how}: {said}",
            expected="a module that can be imported, and a function that returns a number",
            fix="correct the module",
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # the rest of a line that nobody reads
                continue
