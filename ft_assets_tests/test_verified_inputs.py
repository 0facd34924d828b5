"""Bytes that changed in the store after the verdict are refused or made again, by name."""

import json
from pathlib import Path

import pytest

from ft_assets.artifacts import Artifact, ArtifactStore, file_sha256
from ft_assets.artifacts.manifest import MANIFEST, Manifest
from ft_assets_tests.factories import edit, ft
from ft_assets_tests.pipeline import failure, materialize


def current(folder: Path, asset: str) -> Artifact:
    return ArtifactStore(folder / ".ft/store").need(asset, "tiny")


def flip(path: Path) -> None:
    """Change one bit in the middle of a file; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refused(folder: Path) -> str:
    """Change a setting of the merge, and return why merged_model is refused."""
    edit(folder, gate={"min_top1_agreement": 0.9})
    return failure(materialize(folder, "merged_model")).replace("\n", " ")


@pytest.mark.parametrize(
    ("asset", "name"),
    [
        ("base_model", "model.safetensors"),
        ("heldout_split", "heldout.parquet"),
        ("eval_report", "report.json"),
    ],
)
def test_damaged_input_is_not_merged_and_the_advice_heals(
    copy: Path, asset: str, name: str
) -> None:
    flip(current(copy, asset).path / name)
    said = refused(copy)
    assert f"{name}: was changed after it was published" in said
    assert materialize(copy, asset).success  # "materialize … again"
    assert f"{name}: was changed" not in failure(materialize(copy, "merged_model"))


def test_damaged_input_is_one_sentence_of_ft(copy: Path) -> None:
    flip(current(copy, "dpo_adapter").path / "adapter_model.safetensors")
    found = ft(copy, "verify")
    assert found.returncode == 1
    assert "dpo_adapter[tiny]" in found.stdout
    assert "merged_model[tiny]" in found.stdout.split("to do:")[1]
    edit(copy, gate={"min_top1_agreement": 0.9})
    done = ft(copy, "run", "--asset", "merged_model")
    assert done.returncode != 0
    assert "ft run --asset dpo_adapter --base tiny" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def forge(artifact: Artifact, name: str, *, version: bool) -> None:
    """Change a file, and compute its hash and the seal again; the data version too if asked."""
    file = artifact.path / name
    flip(file)
    manifest = artifact.folder / MANIFEST
    content = json.loads(manifest.read_text())
    content["files"][name]["sha256"] = file_sha256(file)
    manifest.write_text(json.dumps(content))
    found = Manifest.read(artifact.folder)
    if version:
        found = found.model_copy(update={"data_version": found.files_version})
    manifest.write_text(found.sealed().to_text())


FORGERIES: list[tuple[str, str, bool, str]] = [
    ("dpo_adapter", "adapter_model.safetensors", False, "its hashes do not give its data version"),
    ("dpo_adapter", "adapter_model.safetensors", True, "the verdict is about another dpo_adapter"),
    ("heldout_split", "heldout.parquet", False, "has other files under the same version"),
    ("eval_report", "report.json", False, "its hashes do not give its data version"),
]


@pytest.mark.parametrize(("asset", "name", "version", "said"), FORGERIES)
def test_manifest_that_was_changed_with_its_file_is_refused(
    copy: Path, asset: str, name: str, version: bool, said: str
) -> None:
    forge(current(copy, asset), name, version=version)
    assert said in refused(copy)
    found = ft(copy, "verify", "--json")
    assert found.returncode == 1
    assert asset in {line["asset"] for line in json.loads(found.stdout)["damaged"]}
