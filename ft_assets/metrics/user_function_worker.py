"""Call the user's function in a process of its own: `python -P user_function_worker.py name root`.

Lines of JSON: stdin has [answer, reference, messages] for each row. The output has a first line on
the import, and then one for each row: {"value": 0.5} or {"problem": …}. Uses the standard library
alone, because the user's module decides what this process imports.
"""

import ctypes
import importlib
import inspect
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h
SHOWN = 200


def main() -> None:
    name, root = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    # What the user's code prints goes to stderr, and it reads nothing from stdin.
    rows, told = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def tell(**line: Any) -> None:
        print(json.dumps(line), file=told, flush=True)

    sys.path.insert(0, root)
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
        inspect.signature(found).bind("answer", "reference", [])
    except BaseException as error:  # the user's module may raise anything, and may call sys.exit
        tell(problem=_said(error))
        return
    tell(value=0.0)
    for row in rows:
        tell(**_scored(found, *json.loads(row)))


def _scored(function: Callable[..., Any], *row: Any) -> dict[str, Any]:
    try:
        value = function(*row)
    except BaseException as error:
        return {"problem": f"raised {_said(error)}"}
    try:
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return {"value": float(value)}
        return {"problem": f"returned {repr(value)[:SHOWN]}"}
    except OverflowError:
        return {"problem": "returned a number that is too large for a float"}
    except Exception:  # the repr of an object of the user's
        return {"problem": f"returned an object of the class {type(value).__name__}"}


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # the text of an exception of the user's
        return type(error).__name__


if __name__ == "__main__":
    main()
