"""Old or new, never half, never silently other: the store under kills, full disks and rivals.

A few examples here; `make chaos` runs many (FT_CHAOS_EXAMPLES).
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ft_assets.artifacts import ArtifactStore
from ft_assets.release.register import (
    PROMOTED,
    PROPOSED,
    ROLLED_BACK,
    HistoryEntry,
    ReleaseState,
    state_of,
    withdrawn_by,
)
from ft_assets.release.whole_register import current_release
from ft_assets_tests.chaos_worker import BROKEN, ENDED, REFUSED, Operation
from ft_assets_tests.registers import home

EXAMPLES = int(os.environ.get("FT_CHAOS_EXAMPLES", "5"))
STEPS = 12
NAMES = st.sampled_from(["one", "two", "three", "four"])
FAULTS = st.sampled_from(["", "", "kill", "kill", "full"])
# A publication makes 21 calls, a decision with its model 46.
CALLS = st.integers(1, 46)
MEMORY = Path("/dev/shm")

_worker: list[subprocess.Popen[str]] = []


def run(operations: Sequence[Operation]) -> list[int]:
    """Let the worker process, which is started once, run operations at once."""
    if not _worker:
        command = [sys.executable, "-m", "ft_assets_tests.chaos_worker"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _worker.append(subprocess.Popen(command, text=True, **pipes))
    worker = _worker[0]
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(operations) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def teardown_module() -> None:
    for worker in _worker:
        worker.communicate()
    _worker.clear()


class StoreUnderAttack(RuleBasedStateMachine):
    """The state is what a reader has seen; an operation in between may have happened or not."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.store = ArtifactStore(self.root)
        self.rows: str | None = None  # what raw_dataset's readers see
        self.history: list[HistoryEntry] = []

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def run(self, *operations: tuple[str, str, str, int]) -> list[int]:
        codes = run(
            [
                Operation(root=str(self.root), what=what, name=name, fault=fault, at=at)
                for what, name, fault, at in operations
            ]
        )
        assert BROKEN not in codes, "an error that is not the store's own"
        for code, (_, _, fault, _) in zip(codes, operations, strict=True):
            assert code != ENDED or fault == "kill"
            refused = code == REFUSED and operations[0][0] != "roll back"  # its model may be gone
            assert not refused or fault == "full" or len(operations) > 1
        return codes

    @property
    def state(self) -> ReleaseState:
        return state_of(current_release(self.store, "tiny"))

    def read_rows(self) -> str | None:
        found = self.store.current("raw_dataset", None)
        if found is None:
            return None
        return (self.store.verified(found).path / "0.txt").read_text()

    @rule(name=NAMES, fault=FAULTS, at=CALLS)
    def publish(self, name: str, fault: str, at: int) -> None:
        (code,) = self.run(("publish", name, fault, at))
        self.sees_rows({self.rows, name} if code else {name})

    @rule(name=NAMES, fault=FAULTS, at=st.integers(1, 6))
    def go_back(self, name: str, fault: str, at: int) -> None:
        self.run(("point", name, fault, at))
        self.sees_rows({self.rows, name})

    @rule(names=st.lists(NAMES, min_size=2, max_size=2), fault=FAULTS, at=CALLS)
    def publish_at_once(self, names: list[str], fault: str, at: int) -> None:
        codes = self.run(("publish", names[0], fault, at), ("publish", names[1], "", 0))
        assert codes[1] == 0
        self.sees_rows(set(names))

    def sees_rows(self, possible: set[str | None]) -> None:
        self.rows, before = self.read_rows(), self.rows
        assert self.rows in possible, f"{before} became {self.rows}"

    @rule(name=NAMES, fault=FAULTS, at=CALLS)
    def promote(self, name: str, fault: str, at: int) -> None:
        (code,) = self.run(("promote", name, fault, at))
        self.sees_history(least=0 if code else 1, most=1)

    @rule(names=st.lists(NAMES, min_size=2, max_size=2, unique=True), fault=FAULTS, at=CALLS)
    def promote_at_once(self, names: list[str], fault: str, at: int) -> None:
        codes = self.run(("promote", names[0], fault, at), ("promote", names[1], "", 0))
        made = codes.count(0)
        self.sees_history(least=made, most=made + codes.count(ENDED) + (fault == "full"))

    @rule(name=NAMES, fault=FAULTS, at=CALLS)
    def propose(self, name: str, fault: str, at: int) -> None:
        (code,) = self.run(("propose", name, fault, at))
        self.sees_history(least=0 if code else 1, most=1)

    @precondition(lambda self: self.history and self.history[-1].decision == PROPOSED)
    @rule(decision=st.sampled_from(["approve", "reject"]), fault=FAULTS, at=CALLS)
    def answer(self, decision: str, fault: str, at: int) -> None:
        proposal = self.history[-1]
        (code,) = self.run(("answer", decision, fault, at))
        self.sees_history(least=0 if code else 1, most=1)
        if self.history[-1] != proposal:
            approved = proposal.challenger if decision == "approve" else proposal.champion
            assert self.state.champion == approved

    @precondition(lambda self: len(self.history) > 1)
    @rule(pick=st.integers(0, 9), fault=FAULTS, at=CALLS)
    def roll_back(self, pick: int, fault: str, at: int) -> None:
        now = self.history[-1].champion
        known = [line.champion for line in self.history if line.champion is not None]
        others = [model for model in known if now and model.identity != now.identity]
        if others:
            name = others[pick % len(others)].candidate
            (code,) = self.run(("roll back", name, fault, at))
            self.sees_history(least=0 if code else 1, most=1)

    def sees_history(self, least: int, most: int) -> None:
        seen = self.state.history
        assert seen[: len(self.history)] == self.history, "the history was changed"
        assert least <= len(seen) - len(self.history) <= most
        self.history = seen

    @rule(fault=FAULTS, at=st.integers(1, 20))
    def collect(self, fault: str, at: int) -> None:
        self.run(("gc", "", fault, at))

    @rule(name=NAMES)
    def collect_at_once(self, name: str) -> None:
        codes = self.run(("gc", "", "", 0), ("publish", name, "", 0))
        assert codes[1] == 0
        self.sees_rows({name})

    @precondition(lambda self: bool(self.history))
    @rule(text=st.sampled_from([None, b"", b"\xff\x00", b"0" * 20]), fault=FAULTS, at=CALLS)
    def lose_the_pointer(self, text: bytes | None, fault: str, at: int) -> None:
        pointer = home(self.store) / "CURRENT"
        pointer.unlink() if text is None else pointer.write_bytes(text)
        (code,) = self.run(("promote", "five", "", 0), ("gc", "", "", 0))[:1]
        if code == 0:  # an interrupted publication tells what CURRENT named
            self.sees_history(least=1, most=1)
            return
        self.run(("repair", "", fault, at))
        self.run(("repair", "", "", 0))

    @precondition(lambda self: bool(self.history))
    @rule(fault=FAULTS, at=CALLS)
    def lose_the_newest_version(self, fault: str, at: int) -> None:
        newest = current_release(self.store, "tiny")
        assert newest is not None
        shutil.rmtree(newest.folder)
        self.run(("repair", "", fault, at))
        self.run(("repair", "", "", 0))

    @invariant()
    def nothing_is_forgotten(self) -> None:
        self.sees_rows({self.rows})
        state = self.state
        assert state.history == self.history
        released = [line for line in state.history if line.decision in (PROMOTED, ROLLED_BACK)]
        assert state.champion == (released[-1].champion if released else None)
        assert state.withdrawn == withdrawn_by(self.history)
        if state.champion is not None:
            assert self.store.find("merged_model", "tiny", state.champion.merged_model) is not None

    @rule()
    def no_leftover_outlives_gc(self) -> None:
        self.run(("gc", "", "", 0))
        names = [path.name for path in self.root.rglob("*")]
        assert not [name for name in names if name.startswith((".tmp-", ".trash-"))]


@pytest.mark.parametrize("fault", ["kill", "full"])
def test_change_that_ends_at_any_call_has_happened_or_not(tmp_path: Path, fault: str) -> None:
    root = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else tmp_path))
    store, before = ArtifactStore(root), dict[str, object]()

    def seen() -> dict[str, object]:
        rows, state = store.current("raw_dataset", None), state_of(current_release(store, "tiny"))
        return {"publish": rows and rows.manifest.settings, "promote": state.sequence}

    for what in ("publish", "promote"):
        for at in itertools.count(1):
            before = seen()
            operation = Operation(root=str(root), what=what, name=f"m{at}", fault=fault, at=at)
            (code,) = run([operation])
            new = f"m{at}" if what == "publish" else int(str(before[what])) + 1
            assert seen()[what] in ((new,) if code == 0 else (before[what], new))
            if code == 0:
                break
        assert at > 15  # the calls were met
    shutil.rmtree(root)


TestStoreUnderAttack = StoreUnderAttack.TestCase
TestStoreUnderAttack.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    # The same few examples in each run of the suite; `make chaos` draws others each time.
    derandomize="FT_CHAOS_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
