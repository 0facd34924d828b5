"""What `lora.method: auto` and `lora.base_compute: auto` resolved to.

It is stored beside the checkpoints for a retry, and in the adapter for later steps. The fingerprint
holds only `auto`, and the checkpoints of a version are under that fingerprint. A retry may find
another amount of free memory, but it must not continue, unnoticed, an adapter that was trained on a
16-bit base on an NF4 one.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ft_assets.config import LoraSettings
from ft_assets.errors import ConfigError, MemoryPlanError
from ft_assets.job import Report
from ft_assets.training.checkpoints import last_whole
from ft_assets.training.memory_plan.plan import Plan

PLAN_FILE = "info/plan.json"  # in an adapter
STARTED_PLAN_FILE = "plan.json"  # beside the checkpoints


def save_plan(plan: Plan, output: Path) -> None:
    """Write the plan into the adapter's folder: later steps read the method from there."""
    (output / "info").mkdir(exist_ok=True)
    (output / PLAN_FILE).write_text(json.dumps(plan.metrics()))


def resolve_method(adapter: Path, lora: LoraSettings) -> LoraSettings:
    """Replace `lora.method: auto` by the method that an adapter was trained with."""
    if lora.method != "auto":
        return lora
    path = adapter / PLAN_FILE
    method = json.loads(path.read_text())["method"] if path.is_file() else "lora"
    return lora.model_copy(update={"method": method})


def plan_once(
    lora: LoraSettings, checkpoints: Path, plan: Callable[[LoraSettings], Plan], report: Report
) -> Plan:
    """Make the plan and store it beside the checkpoints.

    If there is a complete checkpoint, `auto` keeps what its training started with: the method, and
    FP8 or bf16. Raises MemoryPlanError if that method no longer fits: a trained adapter is not
    thrown away without the user's consent.
    """
    started = None
    compute = lora.base_compute
    if "auto" in (lora.method, compute) and last_whole(checkpoints, report):
        begun = _started_plan(checkpoints)
        if begun and compute == "auto":
            compute = "fp8" if begun.get("base_compute") == "fp8" else "bf16"
            report(f"lora.base_compute: auto stays {compute}, as when the checkpoints were begun")
        started = begun.get("method") if lora.method == "auto" else None
    if compute != lora.base_compute:
        lora = lora.model_copy(update={"base_compute": compute})
        plan = _as_started(plan, checkpoints)
    if started is None:
        made = plan(lora)
    else:
        try:
            made = plan(lora.model_copy(update={"method": started}))
        except MemoryPlanError as error:
            raise _started_no_longer_fits(error, started, checkpoints) from None
        report(f"lora.method: auto stays {started}, as when the checkpoints were begun")
    checkpoints.mkdir(parents=True, exist_ok=True)
    staged = checkpoints / f".{STARTED_PLAN_FILE}-{os.getpid()}"  # several ranks write the same
    staged.write_text(json.dumps(made.metrics()))
    os.replace(staged, checkpoints / STARTED_PLAN_FILE)
    return made


def _as_started(
    plan: Callable[[LoraSettings], Plan], checkpoints: Path
) -> Callable[[LoraSettings], Plan]:
    """Return `plan`, with an advice for a machine that lacks the FP8 of a begun training."""

    def checked(lora: LoraSettings) -> Plan:
        try:
            return plan(lora)
        except ConfigError as error:
            if error.where != "lora.base_compute":
                raise
            raise ConfigError(
                where=error.where,
                found=f"{error.found}; auto was fp8 when the checkpoints of this version were "
                "begun",
                expected=error.expected,
                fix="continue on such a GPU; or set lora.base_compute: bf16, which makes another "
                f"version; or delete {checkpoints} to start this version again",
            ) from None

    return checked


def _started_no_longer_fits(
    error: MemoryPlanError, started: str, checkpoints: Path
) -> MemoryPlanError:
    return MemoryPlanError(
        where=error.where,
        found=f"{error.found}, and lora.method: auto was {started} when the checkpoints of this "
        "version were begun",
        expected=error.expected,
        fix="free that memory or raise memory_limit_gb to continue; or name another lora.method, "
        f"which makes another version; or delete {checkpoints} to start this version again",
    )


def _started_plan(checkpoints: Path) -> dict[str, Any]:
    """Return the stored plan; empty if an older version of ft_assets did not store it."""
    try:
        return dict(json.loads((checkpoints / STARTED_PLAN_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}
