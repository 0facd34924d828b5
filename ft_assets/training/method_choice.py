"""Which method `lora.method: auto` came to: kept beside the checkpoints for a retry, and in the adapter for later steps.

The fingerprint holds only `auto`, and the checkpoints of a version lie under it. A retry may find other memory free, but an
adapter that was trained on a 16-bit base must not go on, unnoticed, on an NF4 one.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from ft_assets.config import LoraSettings
from ft_assets.errors import MemoryPlanError
from ft_assets.job import Report
from ft_assets.training.checkpoints import last_whole
from ft_assets.training.memory_plan.plan import Plan

CHOICE = "info/plan.json"
BEGUN = "plan.json"


def save_choice(plan: Plan, output: Path) -> None:
    """Write what the plan chose into the adapter's folder: later steps read the method from there and do not choose again."""
    (output / "info").mkdir(exist_ok=True)
    (output / CHOICE).write_text(json.dumps(plan.facts()))


def chosen_method(adapter: Path, lora: LoraSettings) -> LoraSettings:
    """Return the settings with the method that an adapter was trained with, where it was left to the plan."""
    if lora.method != "auto":
        return lora
    path = adapter / CHOICE
    return lora.model_copy(
        update={"method": json.loads(path.read_text())["method"] if path.is_file() else "lora"}
    )


def plan_once(
    lora: LoraSettings, checkpoints: Path, plan: Callable[[LoraSettings], Plan], report: Report
) -> Plan:
    """Return the plan, and note it beside the checkpoints. Where there is a whole checkpoint, `auto` is what it was when that
    training began. Raises MemoryPlanError if this does not fit any more: what was trained is not thrown away unasked."""
    begun = (
        _begun(checkpoints) if lora.method == "auto" and last_whole(checkpoints, report) else None
    )
    if begun is None:
        found = plan(lora)
    else:
        try:
            found = plan(lora.model_copy(update={"method": begun}))
        except MemoryPlanError as error:
            raise MemoryPlanError(
                where=error.where,
                found=f"{error.found}, and lora.method: auto was {begun} when the checkpoints of this version were begun",
                expected=error.expected,
                fix=f"free that memory or raise memory_limit_gb to go on; or name another lora.method, which is another version; or delete "
                f"{checkpoints} to begin this one anew",
            ) from None
        report(f"lora.method: auto stays {begun}, as when the checkpoints were begun")
    checkpoints.mkdir(parents=True, exist_ok=True)
    staged = checkpoints / f".{BEGUN}-{os.getpid()}"  # several ranks write the same
    staged.write_text(json.dumps(found.facts()))
    os.replace(staged, checkpoints / BEGUN)
    return found


def _begun(checkpoints: Path) -> str | None:
    """Return the noted method; None where it was not noted, as by versions of this program that did not."""
    try:
        return json.loads((checkpoints / BEGUN).read_text())["method"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
