"""Changes a store in child processes that die, or find the disk full, at a given system call.

The process reads a list of operations a line, forks a child for each, and writes their exit codes:
0 done, ENDED killed, REFUSED an error. It has no threads, unlike a process that runs tests.
"""

import builtins
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ft_assets.artifacts import ArtifactStore, ObjectStore, fingerprint
from ft_assets.commands.gc import removals, remove
from ft_assets.config import Project
from ft_assets.errors import FtError, InfrastructureFault
from ft_assets.release.approval import Answer, answer
from ft_assets.release.lookup import need_model
from ft_assets.release.register import ReleasedModel, state_of
from ft_assets.release.whole_register import current_release, repair
from ft_assets_tests.registers import decide, merged_model

ENDED, REFUSED, BROKEN = 9, 3, 4


class Operation(TypedDict):
    """What a child does. fault: "", "kill" or "full" at the system call number `at`."""

    root: str
    what: str
    name: str
    fault: str
    at: int


def arm(fault: str, at: int) -> None:
    """Let the `at`-th change of the disk by this process fail, and with a full disk all later."""
    if not fault:
        return
    seen = 0

    def strike() -> None:
        nonlocal seen
        seen += 1
        if fault == "kill" and seen == at:
            os._exit(ENDED)
        if fault == "full" and seen >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def struck(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            strike()
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "mkdir"):
        setattr(os, name, struck(getattr(os, name)))
    real_open = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        made = real_open(file, mode, *args, **kwargs)
        if set(mode) & set("wxa"):
            strike()  # the file is there, and empty
        return made

    io.open = builtins.open = opened


PROJECT = Project.model_validate(
    {"base_models": {"tiny": {"folder": "model"}}, "data": {"train": ["train.jsonl"]}}
)


def publish(store: ArtifactStore, name: str) -> None:
    with store.staging("raw_dataset", None) as staged:
        for number in range(2):
            (staged / f"{number}.txt").write_text(name)
        store.publish(
            staged,
            asset="raw_dataset",
            partition=None,
            version=fingerprint("raw_dataset", "1", name, {}, {}),
            code_version="1",
            settings=name,
            inputs={},
            environment={},
            metrics={},
            started=0.0,
        )


def roll_back(store: ArtifactStore, name: str) -> None:
    state = state_of(current_release(store, "tiny"))
    champions = [line.champion for line in state.history if line.champion is not None]
    former = {model.candidate: model for model in champions}
    need_model(store, "tiny", former[name], "release[tiny]")
    decide(store, former[name], rolled_back=f"back to {name}")


def decided(store: ArtifactStore, decision: str) -> None:
    """Answer the open proposal, as a person does."""
    proposal = state_of(current_release(store, "tiny")).proposal
    assert proposal is not None, "the test answers only what is proposed"
    given = {"decision": decision, "version": proposal.challenger.merged_model, "by": "test"}
    said = Answer.model_validate({**given, "name": "Ada", "reason": "it is so"})
    answer(PROJECT, store, "tiny", said, "")


def point(store: ArtifactStore, name: str) -> None:
    found = store.find("raw_dataset", None, fingerprint("raw_dataset", "1", name, {}, {}))
    if found is not None:
        store.make_current(found, None)


def collect(store: ArtifactStore, name: str) -> None:
    """Remove as `ft gc --apply --keep 1` does, ten days from now."""
    from time import time

    for removal in removals(store, 1, time() + 864_000)[0]:
        remove(store, removal)


CHANGES: dict[str, Callable[[ArtifactStore, str], object]] = {
    "publish": publish,
    "point": point,
    "promote": lambda store, name: decide(store, merged_model(store, name)),
    "propose": lambda store, name: decide(store, merged_model(store, name), held=True),
    "answer": decided,
    "roll back": roll_back,
    "gc": collect,
    "repair": lambda store, name: repair(store, "tiny"),
}


def child(operation: Operation) -> int:
    arm(operation["fault"], operation["at"])
    try:
        CHANGES[operation["what"]](ArtifactStore(Path(operation["root"])), operation["name"])
    except (FtError, InfrastructureFault, OSError):
        return REFUSED
    except Exception as error:
        print(f"{operation}: {error!r}", file=sys.stderr)
        return BROKEN
    return 0


def run(operations: Sequence[Operation]) -> list[int]:
    """Run all operations at once; return the exit code of each."""
    children = []
    for operation in operations:
        pid = os.fork()
        if pid == 0:
            os._exit(child(operation))
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


if __name__ == "__main__":
    # Imported before the first fork, as each child needs them.
    import filelock  # noqa: F401

    assert ObjectStore is not None
    assert ReleasedModel is not None
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
