"""The user's own metric: a Python function named in finetune.yaml, called once a row."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ft_assets.errors import EvaluationError

Function = Callable[[str, str, list[dict[str, str]]], float]


def load_function(name: str, root: Path) -> Function:
    """Return the function of `module:function`, the module also found beside finetune.yaml. Raises EvaluationError."""
    module, _, function = name.partition(":")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise EvaluationError(
            where=f"evaluation.python: {name}",
            found=str(error),
            expected=f"a module beside {root / 'finetune.yaml'}, or an installed one",
            fix="correct the name",
        ) from None
    return found


def own_scores(
    function: Function,
    name: str,
    ids: list[str],
    answers: list[str],
    references: list[str],
    prompts: list[list[dict[str, str]]],
) -> list[float]:
    """Return the function's number for each row. Raises EvaluationError naming the row at which it raised or gave no number."""
    scores = []
    for row, answer, reference, messages in zip(ids, answers, references, prompts, strict=True):
        try:
            value: Any = function(answer, reference, messages)
        except Exception as error:  # the user's code may raise anything
            raise EvaluationError(
                where=f"evaluation.python: {name}, row {row}",
                found=f"raised {type(error).__name__}: {error}",
                expected="a number",
                fix="correct the function",
            ) from error
        if isinstance(value, bool | int | float) and math.isfinite(value):
            scores.append(float(value))
        else:
            raise EvaluationError(
                where=f"evaluation.python: {name}, row {row}",
                found=f"returned {value!r}",
                expected="a finite number",
                fix="correct the function",
            )
    return scores
