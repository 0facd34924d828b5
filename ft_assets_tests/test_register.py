"""The register of releases: what is lost or put back is refused, and is repaired on request."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.errors import ReleaseError
from ft_assets.release.champion import rollback_target
from ft_assets.release.lookup import need_champion
from ft_assets.release.register import ReleaseState, state_of
from ft_assets.release.whole_register import DECISIONS, current_release, repair
from ft_assets_tests.registers import decide, home, merged_model

Register = tuple[ArtifactStore, list[Artifact]]


@pytest.fixture
def register(tmp_path: Path) -> Register:
    """Three decisions: one and two are promoted, then two is rolled back to one."""
    store = ArtifactStore(tmp_path)
    one, two = merged_model(store, "one"), merged_model(store, "two")
    return store, [decide(store, one), decide(store, two), decide(store, one, "it swears")]


def state(store: ArtifactStore) -> ReleaseState:
    return state_of(current_release(store, "tiny"))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path, list[Artifact]], object], str]] = {
    "CURRENT is deleted": (
        lambda home, _: (home / "CURRENT").unlink(),
        "CURRENT is missing, but decision 3 was made",
    ),
    "CURRENT is empty": (lambda home, _: (home / "CURRENT").write_text(""), "CURRENT is empty"),
    "CURRENT is random": (
        lambda home, _: (home / "CURRENT").write_bytes(b"\xff\x00\xfe"),
        "CURRENT holds b'",
    ),
    "CURRENT of an older backup": (
        lambda home, made: (home / "CURRENT").write_text(made[1].fingerprint),
        "CURRENT names decision 2, but decision 3 was made",
    ),
    "CURRENT and DECISIONS of an older backup": (
        lambda home, made: (
            (home / "CURRENT").write_text(made[0].fingerprint),
            (home / DECISIONS).write_text(lines(home / DECISIONS)[0]),
        ),
        "CURRENT names decision 1, but decision 3 was made",
    ),
    "the newest version is lost": (
        lambda home, made: shutil.rmtree(made[2].folder),
        "which the store has lost",
    ),
    "the newest version is lost, CURRENT is older": (
        lambda home, made: (
            shutil.rmtree(made[2].folder),
            (home / "CURRENT").write_text(made[1].fingerprint),
        ),
        "CURRENT names decision 2, but decision 3 was made",
    ),
    "all versions but the first are lost": (
        lambda home, made: (
            shutil.rmtree(made[1].folder),
            shutil.rmtree(made[2].folder),
            (home / "CURRENT").unlink(),
        ),
        "CURRENT is missing, but decision 3 was made",
    ),
    "all versions are lost": (
        lambda home, made: [shutil.rmtree(one.folder) for one in made],
        "which the store has lost",
    ),
    "a bit of the newest history": (
        lambda home, made: _flip(made[2].folder / "history.jsonl"),
        "history.jsonl: was changed after it was published",
    ),
    "the manifest of the newest version": (
        lambda home, made: (made[2].folder / "manifest.json").write_bytes(b"\xff\x00"),
        "its manifest cannot be read",
    ),
    "DECISIONS is random": (
        lambda home, _: (home / DECISIONS).write_bytes(b"\xff\x00"),
        "DECISIONS is damaged",
    ),
    "DECISIONS lacks a line in between": (
        lambda home, _: (home / DECISIONS).write_text("".join(lines(home / DECISIONS)[::2])),
        "DECISIONS is damaged",
    ),
}


@pytest.mark.parametrize(("damage", "found"), DAMAGES.values(), ids=DAMAGES)
def test_register_that_is_not_whole_is_refused_and_repaired_without_forgetting(
    register: Register, damage: Callable[[Path, list[Artifact]], object], found: str
) -> None:
    store, made = register
    before = state(store)
    assert before.champion is not None
    damage(home(store), made)
    with pytest.raises(ReleaseError, match="the register is not whole") as error:
        current_release(store, "tiny")
    assert found in error.value.found
    assert "ft release --repair --base tiny" in error.value.fix
    done = repair(store, "tiny")
    assert "found: " in done
    assert f"decision 3, champion merged_model {before.champion.merged_model}" in done
    after = state(store)
    assert after.history == before.history
    assert after.withdrawn == before.withdrawn != {}
    assert after.previous == before.previous
    assert repair(store, "tiny") == "the register is whole; nothing was changed"
    decide(store, merged_model(store, "three"))
    assert state(store).sequence == 4


def test_register_without_any_trace_begins_and_an_old_one_without_decisions_is_whole(
    register: Register, tmp_path: Path
) -> None:
    store, made = register
    assert current_release(ArtifactStore(tmp_path / "other"), "tiny") is None
    (home(store) / DECISIONS).unlink()
    assert current_release(store, "tiny") == made[2]


def test_two_longest_histories_are_not_chosen_between(register: Register) -> None:
    store, _ = register
    other = ArtifactStore(store.root.parent / "other")
    shutil.copytree(store.root, other.root)
    decide(store, merged_model(store, "three"))
    decide(other, merged_model(other, "four"))
    foreign = current_release(other, "tiny")
    assert foreign is not None
    shutil.copytree(foreign.folder, home(store) / foreign.fingerprint)
    (home(store) / "CURRENT").unlink()
    (home(store) / DECISIONS).unlink()
    with pytest.raises(ReleaseError, match="are different decisions of the number 4"):
        repair(store, "tiny")


def test_decision_that_was_overtaken_is_refused(register: Register) -> None:
    store, made = register
    decide(store, merged_model(store, "three"))
    with pytest.raises(ReleaseError, match="another run made a decision while decision 4"):
        decide(store, merged_model(store, "four"), before=made[2])
    assert state(store).sequence == 4
    assert [one.candidate for one in [state(store).champion] if one] == ["three"]


def test_previous_does_not_reinstate_a_withdrawn_model(register: Register) -> None:
    store, _ = register
    with pytest.raises(ReleaseError, match="was withdrawn: it swears"):
        rollback_target(state(store), "previous", "release[tiny]")
    two = state(store).history[1].champion
    assert rollback_target(state(store), two.merged_model[:8], "release[tiny]") == two


def test_lost_champion_is_an_error_that_says_so(register: Register) -> None:
    store, made = register
    champion = state(store).champion
    assert champion is not None
    shutil.rmtree(store.root / "merged_model/tiny" / champion.merged_model)
    with pytest.raises(ReleaseError, match=f"{champion.merged_model} is no longer in the store"):
        need_champion(store, "tiny", "release[tiny]")
    shutil.rmtree(made[2].folder)
    with pytest.raises(ReleaseError, match="are both lost"):
        repair(store, "tiny")
