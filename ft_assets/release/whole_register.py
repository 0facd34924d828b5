"""Whether the register of releases is whole, and its repair.

CURRENT names the newest decision, whose version has the whole history. DECISIONS beside it is a
copy of that history: a lost version, or a pointer to an older one, is found by it. A register that
is not whole is refused, never taken for an empty one.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError

from ft_assets.artifacts import Artifact, ArtifactStore, fingerprint
from ft_assets.artifacts.store import CURRENT, NEXT, Turn
from ft_assets.errors import ArtifactError, ReleaseError
from ft_assets.release.register import (
    HistoryEntry,
    ReleaseState,
    entry_metrics,
    gain_of,
    history_text,
    read_state,
    state_of,
    withdrawn_by,
    write_release,
)

RELEASE = "release"
DECISIONS = "DECISIONS"  # beside CURRENT; a copy of the newest history.jsonl


@dataclass(frozen=True)
class _Register:
    """Everything that a partition has: versions with their states, and what is beside them."""

    valid: list[tuple[Artifact, ReleaseState]]
    damaged: list[str]  # descriptions
    remembered: list[HistoryEntry]
    current: str | None
    interrupted: list[str]  # versions whose publication did not end
    problems: list[str]  # of the files beside the versions

    @property
    def made(self) -> tuple[Artifact, ReleaseState] | None:
        """The newest decision: a version is decided when DECISIONS has it, and then CURRENT.

        A process that ended in between left its name in NEXT.
        """
        for one, state in self.valid:
            if one.fingerprint in self.interrupted and state.history == self.remembered:
                return one, state
        return next((pair for pair in self.valid if pair[0].fingerprint == self.current), None)

    @property
    def newest(self) -> int:
        """The number of the newest decision that anything tells of."""
        return max([len(self.remembered), *(len(state.history) for _, state in self.valid)])


def current_release(store: ArtifactStore, partition: str) -> Artifact | None:
    """Return the current release, None before the first. Raises ReleaseError.

    It is refused if CURRENT is missing, damaged, or older than the newest decision.
    """
    register = _read(store, partition)
    problem = _problem(register)
    if problem is not None:
        raise ReleaseError(
            where=f"{RELEASE}[{partition}]",
            found=f"the register is not whole: {problem}",
            expected=f"{CURRENT}, the versions and {DECISIONS} with the same newest decision",
            fix=f"ft release --repair --base {partition}; if a backup has what is missing, restore "
            "it first",
        )
    return register.made[0] if register.made else None


def turn(store: ArtifactStore, partition: str, before: Artifact | None, sequence: int) -> Turn:
    """Return what is done when decision `sequence` becomes current.

    It is refused if another one was made since `before` was read. Then DECISIONS is written, which
    never lags behind CURRENT.
    """

    def check(version: str) -> None:
        current = current_release(store, partition)
        found = current.fingerprint if current else None
        if found not in (before.fingerprint if before else None, version):
            raise _overtaken(partition, sequence, f"version {found} is current")
        first = store.claim(RELEASE, partition, _claim(sequence), version)
        if first != version:
            raise _overtaken(partition, sequence, f"version {first} has its number")

    return Turn(check, partial(_remember, store, partition))


def _remember(store: ArtifactStore, partition: str, version: Artifact) -> None:
    """Write the history of a version to DECISIONS."""
    text = history_text(state_of(version).history)
    store.write_beside(RELEASE, partition, DECISIONS, text.encode())


def repair(store: ArtifactStore, partition: str) -> str:
    """Make a register whole; return a description of what was done. Raises ReleaseError.

    CURRENT gets the version with the longest valid history. Decisions that only DECISIONS still
    has are written again, as a new version.
    """
    register = _read(store, partition)
    problem = _problem(register)
    if problem is None and (
        register.made is None or register.made[0].fingerprint == register.current
    ):
        return "the register is whole; nothing was changed"
    best, state = _best(register, partition)
    lost = register.remembered[len(state.history) :]
    for number in range(len(state.history) + len(lost) + 1, register.newest + 2):
        store.remove_beside(RELEASE, partition, _claim(number))
    if lost or best is None:
        best = _written_again(store, partition, state, lost)
    else:
        store.make_current(best, partition, Turn(after=partial(_remember, store, partition)))
        _remember(store, partition, best)  # also if it was current before
    return _done(problem or "a release that was interrupted", register, best, state, lost)


def _read(store: ArtifactStore, partition: str) -> _Register:
    found, unreadable = store.versions(RELEASE, partition)
    valid = list[tuple[Artifact, ReleaseState]]()
    damaged = [f"{folder}: its manifest cannot be read" for folder in unreadable]
    for version in found:
        try:
            valid.append((version, _sound_state(store, version)))
        except ArtifactError as error:
            damaged.append(f"{error.where}: {error.found}")
    problems, texts = list[str](), dict[str, str | None]()
    try:
        texts[CURRENT] = store.current_name(RELEASE, partition)
    except ArtifactError as error:
        problems.append(f"{CURRENT} {error.found}")
    remembered = list[HistoryEntry]()
    try:
        lines = (store.read_beside(RELEASE, partition, DECISIONS) or b"").splitlines()
        remembered = [HistoryEntry.model_validate_json(line) for line in lines]
        if not _is_counted(remembered):
            raise ValueError
    except (ArtifactError, ValidationError, ValueError):
        remembered = []
        problems.append(f"{DECISIONS} is damaged")
    following = store.read_beside(RELEASE, partition, NEXT) or b""
    return _Register(
        valid=valid,
        damaged=damaged,
        remembered=remembered,
        current=texts.get(CURRENT),
        interrupted=following.decode(errors="replace").split(),
        problems=problems,
    )


def _sound_state(store: ArtifactStore, version: Artifact) -> ReleaseState:
    """Return the state of a version whose files are whole and agree. Raises ArtifactError."""
    state = state_of(store.verified(version))
    last = state.history[-1] if state.history else None
    sound = (
        last is not None
        and _is_counted(state.history)
        and (last.sequence, last.champion) == (state.sequence, state.champion)
        and state.withdrawn == withdrawn_by(state.history)
    )
    if not sound:
        raise ArtifactError(
            where=str(version.folder), found="its history and release.json do not agree"
        )
    return state


def _is_counted(history: list[HistoryEntry]) -> bool:
    return [entry.sequence for entry in history] == list(range(1, len(history) + 1))


def _problem(register: _Register) -> str | None:
    """Return what is not whole, None if nothing is."""
    if register.problems:
        return "; ".join(register.problems)
    if not (register.valid or register.damaged or register.remembered or register.current):
        return None
    if register.made is None and register.current is None:
        only = {one.fingerprint for one, _ in register.valid} <= set(register.interrupted)
        if only and not (register.damaged or register.remembered):
            return None  # the first publication was interrupted: nothing was released yet
        return f"{CURRENT} is missing, but {_told(register)}"
    if register.made is None:
        wrong = next((text for text in register.damaged if str(register.current) in text), None)
        return wrong or f"{CURRENT} names version {register.current}, which the store has lost"
    _, state = register.made
    count = len(state.history)
    if state.history[: len(register.remembered)] != register.remembered[:count]:
        return f"the history of version {register.current} is not the one in {DECISIONS}"
    if count < len(register.remembered):
        return f"{CURRENT} names decision {count}, but {_told(register)}"
    newer = [
        one.fingerprint
        for one, other in register.valid
        if len(other.history) > count and one.fingerprint not in register.interrupted
    ]
    if newer:
        return f"{CURRENT} names decision {count}, but {_told(register)}"
    # A damaged version may be a newer decision. DECISIONS excludes that.
    if register.damaged and len(register.remembered) < count:
        return register.damaged[0]
    return None


def _told(register: _Register) -> str:
    if not register.newest:
        return f"there are damaged versions: {register.damaged[0]}"
    return f"decision {register.newest} was made"


def _best(register: _Register, partition: str) -> tuple[Artifact | None, ReleaseState]:
    """Return the version with the longest history that agrees with DECISIONS.

    Without any version, DECISIONS alone is written again. Raises ReleaseError if neither decides.
    """
    known = len(register.remembered)
    agreeing = [
        (one, state)
        for one, state in register.valid
        if state.history[: len(register.remembered)] == register.remembered[: len(state.history)]
        and not (one.fingerprint in register.interrupted and len(state.history) > known)
    ]
    longest = max((len(state.history) for _, state in agreeing), default=0)
    best = [pair for pair in agreeing if len(pair[1].history) == longest]
    different = {history_text(state.history) for _, state in best}
    if len(different) == 1:
        # Equal histories: two versions of one decision. CURRENT decides, else the newer one.
        return max(
            best,
            key=lambda pair: (pair[0].fingerprint == register.current, pair[0].manifest.started),
        )
    if not agreeing and register.remembered:
        return None, ReleaseState()
    names = ", ".join(one.fingerprint for one, _ in best)
    found = (
        f"versions {names} are different decisions of the number {longest}"
        if best
        else "no version of it is whole and agrees with DECISIONS"
    )
    raise ReleaseError(
        where=f"{RELEASE}[{partition}]",
        found=f"the register cannot be repaired: {found}",
        expected="one longest history",
        fix=f"restore the folder {RELEASE}/{partition} from a backup"
        + (", or move all but the right one of them out of the store" if best else ""),
    )


def _written_again(
    store: ArtifactStore,
    partition: str,
    state: ReleaseState,
    lost: list[HistoryEntry],
) -> Artifact:
    """Publish a version with the decisions that only DECISIONS has."""
    from ft_assets.release.lookup import find_model

    history, last = [*state.history, *lost], lost[-1]
    champion = find_model(store, partition, last.subject)
    if champion is None:
        name = last.subject.merged_model
        raise ReleaseError(
            where=f"{RELEASE}[{partition}]",
            found=f"the newest version of the register and its champion {name} are both lost",
            expected="one of them",
            fix=f"restore {RELEASE}/{partition} or merged_model/{partition}/{name} from a backup, "
            "and repair again",
        )
    settings: dict[str, Any] = {"repaired": [entry.to_dict() for entry in lost]}
    with store.staging(RELEASE, partition) as staged:
        for entry in lost:
            withdrawn = withdrawn_by(history[: entry.sequence])
            write_release(staged, state, entry, withdrawn)
            state = read_state(staged)
        code = "repair"
        inputs = {"champion": champion.data_version}
        metrics = {**entry_metrics(last), **gain_of(champion), "measured_today": False}
        return store.publish(
            staged,
            asset=RELEASE,
            partition=partition,
            version=fingerprint(RELEASE, code, settings, inputs, {}),
            code_version=code,
            settings=settings,
            inputs=inputs,
            environment={},
            metrics=metrics,
            parts={"champion": last.champion.identity if last.champion else ""},
            started=time.time(),
            turn=Turn(after=partial(_remember, store, partition)),
        )


def _done(
    problem: str,
    register: _Register,
    best: Artifact,
    state: ReleaseState,
    lost: list[HistoryEntry],
) -> str:
    champion = (lost or state.history)[-1].champion
    lines = [
        f"found: {problem}",
        f"CURRENT now names version {best.fingerprint}: decision {len(state.history) + len(lost)}, "
        f"champion merged_model {champion.merged_model if champion else '–'}",
    ]
    if lost:
        numbers = ", ".join(str(entry.sequence) for entry in lost)
        lines.append(f"written again from {DECISIONS}, because no version has them: {numbers}")
    lines += [f"left as it is: {text}" for text in register.damaged]
    return "\n".join(lines)


def _claim(sequence: int) -> str:
    return f".decision-{sequence}"


def _overtaken(partition: str, sequence: int, found: str) -> ReleaseError:
    return ReleaseError(
        where=f"{RELEASE}[{partition}]",
        found=f"another run made a decision while decision {sequence} was compared: {found}",
        expected="one decision at a time",
        fix="materialize release again: it then compares with the new champion. If the other run "
        f"was killed: ft release --repair --base {partition}",
    )
