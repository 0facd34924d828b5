"""What a version's files and manifest are compared with, and what heals a damaged version."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ft_assets.artifacts import Artifact, ArtifactStore, file_sha256, fingerprint
from ft_assets.artifacts.checkpoint_files import damage as damage_of_checkpoint
from ft_assets.artifacts.manifest import MANIFEST, Manifest, content_version
from ft_assets.errors import ArtifactError
from ft_assets.release.lookup import find_model, need_model
from ft_assets.release.register import ReleasedModel, identity
from ft_assets.training.checkpoints import last_whole, publish_folder

SETTINGS = {"lr": 0.1}


def publish(
    store: ArtifactStore, asset: str = "lora_adapter", text: str = "weights", **parts: str
) -> Artifact:
    with store.staging(asset, "tiny") as staged:
        (staged / "model.bin").write_text(text * 1000)
        (staged / "info").mkdir()
        (staged / "info/log.txt").write_text("log")
        return store.publish(
            staged,
            asset=asset,
            partition="tiny",
            version=fingerprint(asset, "1", {**SETTINGS, "text": text}, {}, {}),
            code_version="1",
            settings={**SETTINGS, "text": text},
            inputs={},
            environment={},
            metrics={"score": 0.25},
            parts=parts,
            started=time.time(),
        )


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a version."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def flipped(folder: Path) -> None:
    """Change one bit. Size and time of modification stay."""
    path = folder / "model.bin"
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def hashed_again(folder: Path) -> None:
    flipped(folder)
    digest = file_sha256(folder / "model.bin")
    rewrite(folder, lambda content: content["files"]["model.bin"].update(sha256=digest))


def versioned_again(folder: Path) -> None:
    hashed_again(folder)
    found = Manifest.read(folder)
    version = content_version(found.files, found.parts)
    rewrite(folder, lambda content: content.update(data_version=version))


def moved_over(folder: Path) -> None:
    """Put another whole version in the place of this one."""
    other = publish(ArtifactStore(folder.parents[2]), text="other")
    shutil.rmtree(folder)
    shutil.copytree(other.folder, folder)


def of_other_inputs(folder: Path) -> None:
    rewrite(folder, lambda content: content.update(inputs={"base_model": "0" * 20}, seal=""))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (flipped, "model.bin: was changed after it was published: sha256"),
    (lambda folder: os.truncate(folder / "model.bin", 6999), "it has 6999 bytes"),
    (lambda folder: (folder / "model.bin").unlink(), "model.bin: is missing"),
    (lambda folder: flipped_log(folder), "info/log.txt: was changed"),
    (
        lambda folder: (folder / "added_tokens.json").write_text("{}"),
        "added_tokens.json: was added",
    ),
    (hashed_again, "its hashes do not give its data version"),
    (versioned_again, "its seal is broken"),
    (lambda folder: rewrite(folder, lambda it: it["metrics"].update(score=0.75)), "seal is broken"),
    (of_other_inputs, "its settings and inputs do not give its fingerprint"),
    (moved_over, "describes lora_adapter"),
]


def flipped_log(folder: Path) -> None:
    (folder / "info/log.txt").write_text("gol")


@pytest.mark.parametrize(("damage", "found"), DAMAGES)
@pytest.mark.parametrize("parts", [{}, {"train": "1" * 20}])
def test_damage_is_named_with_advice(
    tmp_path: Path, damage: Callable[[Path], object], found: str, parts: dict[str, str]
) -> None:
    store = ArtifactStore(tmp_path / "store")
    made = publish(store, **parts)
    assert store.verified(made) == made
    if parts and damage is hashed_again:  # rows have a version of their own
        found = "its seal is broken"
    damage(made.folder)
    store = ArtifactStore(store.root)
    store.make_current(made, "tiny")
    with pytest.raises(ArtifactError) as caught:
        store.verified(store.need("lora_adapter", "tiny"))
    assert found in str(caught.value)
    assert "ft run --asset lora_adapter --base tiny" in caught.value.fix


def test_manifest_of_before_the_seal_is_read(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = publish(store)
    rewrite(made.folder, lambda content: content.pop("seal"))
    again = store.need("lora_adapter", "tiny")
    assert store.verified(again).manifest.seal == ""
    assert (
        json.loads(again.manifest.to_text()).keys()
        == json.loads((made.folder / MANIFEST).read_text()).keys()
    )


def test_file_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = publish(store)
    rewrite(made.folder, lambda it: it["files"].update({"../../x": it["files"]["model.bin"]}))
    with pytest.raises(ArtifactError, match="outside the version's folder"):
        store.find("lora_adapter", "tiny", made.fingerprint)


def test_advice_is_true_for_history_and_older_versions(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    history = publish(store, "release")
    older, _ = publish(store), publish(store, text="newer")
    for damaged, advice in ((history, "cannot make a history again"), (older, "an older version")):
        flipped(damaged.folder)
        with pytest.raises(ArtifactError) as caught:
            store.verified(damaged)
        assert f"restore {damaged.folder} from a backup" in caught.value.fix
        assert advice in caught.value.fix


def test_damaged_version_is_discarded_and_published_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = publish(store)
    flipped(made.folder)
    store.discard("lora_adapter", "tiny", made.fingerprint)
    assert store.current("lora_adapter", "tiny") is None
    assert store.verified(publish(store)).data_version == made.data_version


def test_champion_with_a_damaged_manifest_can_be_left_but_not_used(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = publish(store, "merged_model")
    model = ReleasedModel(
        identity=identity(made),
        merged_model=made.fingerprint,
        data_version=made.data_version,
        candidate="sft",
        verdict="PASS",
    )
    assert need_model(store, "tiny", model, "release[tiny]") == made
    (made.folder / MANIFEST).write_text("null")
    assert find_model(store, "tiny", model) is None
    with pytest.raises(ArtifactError, match=r"manifest.json: is damaged"):
        need_model(store, "tiny", model, "release[tiny]")


def test_checkpoint_with_a_changed_bit_is_not_resumed_from(tmp_path: Path) -> None:
    for step in (1, 2):
        staged = tmp_path / f"staged-{step}"
        staged.mkdir()
        (staged / "model.bin").write_bytes(bytes(100))
        publish_folder(staged, tmp_path / f"checkpoint-{step}")
    heard: list[str] = []
    (tmp_path / "checkpoint-1/whole.json").write_text('{"model.bin": 100}')  # an older version
    flipped(tmp_path / "checkpoint-2")
    assert last_whole(tmp_path, lambda said, **_: heard.append(said)) == tmp_path / "checkpoint-1"
    assert heard == ["checkpoint-2 is not resumed from: model.bin was changed after it was written"]
    for text in ("{}", "[]", "null", "{", '{"model.bin": "x"}'):
        (tmp_path / "checkpoint-1/whole.json").write_text(text)
        assert damage_of_checkpoint(tmp_path / "checkpoint-1") == "it was not written completely"
