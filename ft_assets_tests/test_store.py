"""The store under several writers at once: one version, whole, for all of them."""

import multiprocessing
import time
from pathlib import Path

from ft_assets.artifacts import Artifact, ArtifactStore, verify_files
from ft_assets.artifacts.store import MANIFEST


def publish(store: ArtifactStore, version: str = "v1", text: str = "rows") -> Artifact:
    with store.staging("raw_dataset", None) as staged:
        for number in range(20):
            (staged / f"{number}.txt").write_text(text * 1000)
        return store.publish(
            staged, asset="raw_dataset", partition=None, version=version, code_version="1", settings={}, inputs={}, environment={},
            metrics={}, started=time.time(),
        )  # fmt: skip


def writer(root: Path, rounds: int) -> None:
    """Make each version and read it at once, as the steps below do. Any error ends the process with a code."""
    store = ArtifactStore(root)
    for number in range(rounds):
        verify_files(publish(store, f"v{number}"))
        verify_files(store.need("raw_dataset", None))


def test_runs_that_make_the_same_version_at_once_do_not_take_it_from_each_other(
    tmp_path: Path,
) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=writer, args=(tmp_path, 15)) for _ in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0, 0, 0, 0]
    home = tmp_path / "raw_dataset/_"
    assert {path.name for path in home.iterdir()} == {
        "CURRENT",
        *(f"v{number}" for number in range(15)),
    }


def test_version_whose_manifest_is_gone_is_replaced(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    first = publish(store)
    (first.path / MANIFEST).unlink()
    (first.path / "0.txt").write_text("damaged")
    assert store.find("raw_dataset", None, "v1") is None
    verify_files(publish(store))
    assert [path.name for path in sorted(first.path.parent.iterdir())] == ["CURRENT", "v1"]


def test_what_a_plan_assumes_is_seen_by_itself_alone(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    old, new = publish(store, "v1", "old"), publish(store, "v2", "new")
    planning = ArtifactStore(tmp_path)
    planning.assume(old, None)
    assert (planning.need("raw_dataset", None), store.need("raw_dataset", None)) == (old, new)
