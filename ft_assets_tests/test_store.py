"""The store under several writers at once: one version, whole, for all of them."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from ft_assets.artifacts import Artifact, ArtifactStore, disk, verify_files
from ft_assets.artifacts.manifest import MANIFEST, Manifest
from ft_assets.artifacts.store import Turn
from ft_assets.commands.gc import removals
from ft_assets.errors import ArtifactError, StoreBusy
from ft_assets.orchestration.assuming_store import AssumingStore


def publish(
    store: ArtifactStore, version: str = "v1", text: str = "rows", turn: Turn | None = None
) -> Artifact:
    with store.staging("raw_dataset", None) as staged:
        for number in range(20):
            (staged / f"{number}.txt").write_text(text * 1000)
        return store.publish(
            staged,
            asset="raw_dataset",
            partition=None,
            version=version,
            code_version="1",
            settings={},
            inputs={},
            environment={},
            metrics={},
            started=time.time(),
            turn=turn,
        )


def writer(root: Path, rounds: int) -> None:
    """Make each version and read it at once, as steps do. An error ends the process with a code."""
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


DAMAGED = [b"", b"\n", b"\xff\xfe\x00", b"../../elsewhere\n", b"v1\nv2\n"]


@pytest.mark.parametrize("data", DAMAGED, ids=repr)
def test_pointer_that_names_no_version_is_an_error_and_is_replaced(
    tmp_path: Path, data: bytes
) -> None:
    store = ArtifactStore(tmp_path)
    first, second = publish(store, "v1"), publish(store, "v2")
    pointer = tmp_path / "raw_dataset/_/CURRENT"
    pointer.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"CURRENT: .*: it names no version"):
        store.need("raw_dataset", None)
    going, _ = removals(store, 1, now=time.time() + 1e6)
    assert going == []  # nobody knows which version is the current one
    store.make_current(first, None)
    assert store.need("raw_dataset", None) == first
    going, _ = removals(store, 1, now=time.time() + 1e6)
    assert going == []  # v1 is current, v2 the newest
    store.make_current(second, None)
    going, _ = removals(store, 1, now=time.time() + 1e6)
    assert [removal.path for removal in going] == [first.folder]


@pytest.mark.parametrize("exchanges", [True, False])
def test_folder_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    made, folder = tmp_path / "made", tmp_path / "folder"
    for path in (made, folder):
        path.mkdir()
        (path / "file").write_text(path.name)
    if exchanges:
        real, seen = os.rename, list[str]()

        def looking(source: Path, target: Path) -> None:
            seen.append((folder / "file").read_text())  # there is no moment without a folder
            real(source, target)
            seen.append((folder / "file").read_text())

        monkeypatch.setattr(disk.os, "rename", looking)
    else:
        monkeypatch.setattr(disk, "_exchange", lambda one, other: False)
    disk.replace(made, folder)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (folder / "file").read_text() == "made"
    if exchanges:
        assert seen == ["folder", "made", "made"]  # the first rename finds the folder occupied


def test_full_disk_keeps_the_pointer_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path)
    first, second = publish(store, "v1"), publish(store, "v2")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(ArtifactError, match="the disk is full"):
        store.make_current(first, None)
    assert store.need("raw_dataset", None) == second
    left = {path.name for path in (tmp_path / "raw_dataset/_").iterdir()}
    assert left == {"CURRENT", "v1", "v2"}


def test_rename_whose_first_answer_was_lost_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS the client asks again, and hears that the folder is gone."""
    real = os.rename

    def answered_late(source: Path, target: Path) -> None:
        real(source, target)
        if ".tmp-" in str(source) and Path(target).name == "v1":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "rename", answered_late)
    made = publish(ArtifactStore(tmp_path))
    verify_files(made)
    assert ArtifactStore(tmp_path).need("raw_dataset", None) == made


def test_turn_is_asked_before_a_change_and_a_second_writer_waits_for_it(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    first = publish(store, "v1")

    def refuse(version: str) -> None:
        other = ArtifactStore(tmp_path)
        with pytest.raises(StoreBusy, match=f"locked by process {os.getpid()} on"):
            publish(other, "v3")
        raise ArtifactError(where="here", found="refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArtifactStore, "lock_seconds", 0.1)
        with pytest.raises(ArtifactError, match="refused"):
            publish(store, "v2", turn=Turn(before=refuse))
    assert store.need("raw_dataset", None) == first
    assert store.find("raw_dataset", None, "v2") is None
    publish(store, "v2")  # the lock is free again


def test_what_a_plan_assumes_is_seen_by_itself_alone(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    old, new = publish(store, "v1", "old"), publish(store, "v2", "new")
    planning = AssumingStore(ArtifactStore(tmp_path))
    planning.assume(old, None)
    assert (planning.need("raw_dataset", None), store.need("raw_dataset", None)) == (old, new)


# Written by the first version of the store: key order, indent and floats are part of the layout.
STORED = """{
 "asset": "raw_dataset",
 "partition": null,
 "fingerprint": "v1",
 "data_version": "4f53cda18c2baa0c0354",
 "parts": {
  "conversations": "é"
 },
 "code_version": "1",
 "settings": {
  "rate": 1e-05,
  "names": [
   "a"
  ]
 },
 "inputs": {},
 "environment": {
  "torch": "2.9"
 },
 "metrics": {
  "rows": 3,
  "loss": NaN
 },
 "files": {
  "0.txt": {
   "bytes": 4,
   "sha256": "ab"
  }
 },
 "started": 1700000000.25,
 "finished": 1700000001.5
}"""


def test_manifest_is_stored_as_it_was_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(STORED)
    assert Manifest.read(tmp_path).to_text() == STORED


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (STORED[:200], "Invalid JSON"),
        ("[1]", "should be an object"),
        (STORED.replace('"files"', '"blobs"'), "files: Field required"),
    ],
)
def test_damaged_or_foreign_manifest_is_one_sentence(tmp_path: Path, text: str, key: str) -> None:
    made = publish(ArtifactStore(tmp_path))
    (made.folder / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError) as error:
        ArtifactStore(tmp_path).need("raw_dataset", None)
    assert error.value.where == str(made.folder / MANIFEST)
    assert error.value.found.startswith("is damaged or was written by another version of ft_assets")
    assert key in error.value.found
    assert error.value.fix == f"delete {made.folder}, and materialize the asset again"
    assert ArtifactStore(tmp_path).versions() == ([], [str(made.folder)])
