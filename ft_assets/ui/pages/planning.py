"""The plan of `ft plan` for a page: made by a child process, and kept until something changes.

A plan takes seconds of CPU time, and the webserver must not import what it needs. So it is made
only when a page asks for it, and only if what decides it differs from the plan before.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ft_assets.artifacts.content_hashes import ContentHashes
from ft_assets.config import find_config
from ft_assets.errors import FtError
from ft_assets.orchestration.data_sources import source_versions
from ft_assets.orchestration.mark_stale import outside
from ft_assets.orchestration.run_plan import MAYBE, REFUSED, RUNS, PlannedStep, memory_of, summary
from ft_assets.views.board import Opened

TIMEOUT_SECONDS = 300
AGAIN_SECONDS = 60


@dataclass(frozen=True)
class BasePlan:
    """The steps of one base model that run, may run, or would be refused, and their summary."""

    base_model: str
    summary: str
    steps: list[PlannedStep]

    @classmethod
    def of(cls, name: str, steps: Sequence[PlannedStep]) -> "BasePlan":
        shown = [step for step in steps if step.action in (RUNS, MAYBE, REFUSED)]
        return cls(name, summary(steps), shown)

    @property
    def memory(self) -> str:
        """The memory of the training that needs most."""
        known = [step for step in self.steps if memory_of(step)]
        size = max(known, key=lambda step: step.predicted_gb or step.memory_gb or 0, default=None)
        return memory_of(size) if size else ""


@dataclass(frozen=True)
class Plan:
    """What would run. made: seconds since 1970. problem: why there is no plan."""

    state: str
    made: float
    bases: list[BasePlan]
    problem: str | None = None

    def holds(self, state: str) -> bool:
        """Return True if a plan of this state would be the same. One that failed is tried again."""
        tried_again = self.problem is not None and time.time() - self.made > AGAIN_SECONDS
        return self.state == state and not tried_again


class Planning:
    """The newest plan, and the child process that makes the next one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plan: Plan | None = None
        self._making: str | None = None  # the state that is planned now

    def look(self, opened: Opened) -> tuple[Plan | None, bool]:
        """Return the newest plan, and whether one of today's state is being made.

        The plan is None before the first. Raises FtError for data that cannot be read.
        """
        project = opened.project
        hashes = ContentHashes(project.root / ".ft" / "hashes.json")
        state = outside(project, source_versions(project, hashes.of))
        with self._lock:
            if self._making is None and (self._plan is None or not self._plan.holds(state)):
                self._making = state
                names = list(opened.project.base_models)
                threading.Thread(target=self._make, args=(state, names), daemon=True).start()
            return self._plan, self._making is not None

    def _make(self, state: str, names: Sequence[str]) -> None:
        plan = planned(state, names)
        with self._lock:
            self._plan, self._making = plan, None


def planned(state: str, names: Sequence[str]) -> Plan:
    """Run `ft plan` in a child process and return what it prints."""
    command = [sys.executable, "-m", "ft_assets.cli", "plan", "--json"]
    try:
        done = subprocess.run(
            command,
            cwd=find_config().parent,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Plan(state, time.time(), [], f"ft plan did not end within {TIMEOUT_SECONDS} s")
    except (FtError, OSError) as error:
        return Plan(state, time.time(), [], str(error))
    try:
        steps = [PlannedStep(**step) for step in json.loads(done.stdout)]
    except ValueError:  # no plan was printed: the reason was
        return Plan(state, time.time(), [], done.stderr.strip())
    count = len(steps) // len(names)  # each base model has a step for each asset
    found = [
        BasePlan.of(name, steps[place * count : (place + 1) * count])
        for place, name in enumerate(names)
    ]
    return Plan(state, time.time(), found)
