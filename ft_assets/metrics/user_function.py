"""The user's own metric: a Python function named in finetune.yaml, called once for each row."""

import importlib
import inspect
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ft_assets.errors import EvaluationError, FtError
from ft_assets.metrics.registry import Metric
from ft_assets.rows.types import Message

Function = Callable[[str, str, Sequence[Message]], float]
Row = tuple[str, str, str, Sequence[Message]]  # its place, the answer, the reference, the prompt


class UserMetric(BaseModel):
    """`evaluation.python` as a mapping."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    function: str = Field(description="module:function(answer, reference, messages) -> number.")
    higher_is_better: bool = Field(default=True, description="False if a lower number is better.")

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


def load_function(name: str, root: Path) -> Function:
    """Load the function of `module:function`; the module may be in `root`.

    Raises EvaluationError if it cannot be imported, or cannot be called with three arguments.
    """
    module, _, function = name.partition(":")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        found = getattr(importlib.import_module(module), function)
        inspect.signature(found).bind("answer", "reference", [])
    except Exception as error:  # the user's module may raise anything
        raise EvaluationError(
            where=f"evaluation.python: {name}",
            found=f"cannot be used: {type(error).__name__}: {error}",
            expected="a function of (answer, reference, messages) in a module beside "
            f"{root / 'finetune.yaml'}, or in an installed one",
            fix="correct the name or the module",
        ) from None
    return found


def require_scores(name: str, root: Path, rows: Sequence[Row]) -> None:
    """Raise EvaluationError unless the function can be loaded and scores each row.

    A child process imports the module: what the module imports does not stay in this one.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, name, str(root)],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        told = done.stdout.strip().splitlines()[-1:]
        if told and told[0].startswith('{"kind"'):
            raise FtError.from_dict(json.loads(told[0]))
        raise EvaluationError(
            where=f"evaluation.python: {name}",
            found=f"it ends the process with code {done.returncode}: {done.stderr[-300:]}",
            expected="a module that can be imported, and a function that returns a number",
            fix="correct the module",
        )


def main() -> None:
    """Score the rows of stdin with `module:function` (argument 1) in a folder (argument 2).

    Print the error, if any, as the last line.
    """
    name, root = sys.argv[1:]
    try:
        function = load_function(name, Path(root))
        for place, answer, reference, messages in json.load(sys.stdin):
            user_scores(function, name, [place], [answer], [reference], [messages])
    except EvaluationError as error:
        print("\n" + json.dumps(error.to_dict()))
        raise SystemExit(1) from None


def user_scores(
    function: Function,
    name: str,
    ids: list[str],
    answers: list[str],
    references: list[str],
    conversations: Sequence[Sequence[Message]],
) -> list[float]:
    """Score each row with the user's function.

    Raises EvaluationError with the id of the row if the function raises or does not return a finite
    number.
    """
    scores = []
    for row, answer, reference, messages in zip(
        ids, answers, references, conversations, strict=True
    ):
        try:
            value: Any = function(answer, reference, messages)
        except Exception as error:  # the user's code may raise anything
            raise EvaluationError(
                where=f"evaluation.python: {name}, row {row}",
                found=f"raised {type(error).__name__}: {error}",
                expected="a number",
                fix="correct the function",
            ) from error
        if not isinstance(value, bool | int | float) or not math.isfinite(value):
            raise EvaluationError(
                where=f"evaluation.python: {name}, row {row}",
                found=f"returned {value!r}",
                expected="a finite number",
                fix="correct the function",
            )
        scores.append(float(value))
    return scores


if __name__ == "__main__":
    main()
