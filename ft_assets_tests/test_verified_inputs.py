"""An input whose bytes changed in the store after the verdict is refused before it is used."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_assets.artifacts import Artifact, ArtifactStore, file_sha256
from ft_assets_tests.factories import edit, ft


def current(folder: Path, asset: str) -> Artifact:
    return ArtifactStore(folder / ".ft/store").need(asset, "tiny")


def flip(path: Path) -> None:
    """Change one bit in the middle of a file; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def adapter(folder: Path) -> str:
    flip(current(folder, "dpo_adapter").path / "adapter_model.safetensors")
    return "adapter_model.safetensors"


def base(folder: Path) -> str:
    flip(current(folder, "base_model").path / "model.safetensors")
    return "model.safetensors"


def rows(folder: Path) -> str:
    flip(current(folder, "heldout_split").path / "heldout.parquet")
    return "heldout.parquet"


@pytest.mark.parametrize("damage", [adapter, base, rows])
def test_damaged_input_is_not_merged(copy: Path, damage: Callable[[Path], str]) -> None:
    name = damage(copy)
    edit(copy, gate={"min_top1_agreement": 0.9})  # merged_model is made again
    done = ft(copy, "run", "--asset", "merged_model")
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert f"{name}: was changed after it was published" in said.replace("\n", " ")
    assert "Traceback" not in said


def test_manifest_that_was_changed_with_its_file_is_refused(copy: Path) -> None:
    damaged = current(copy, "dpo_adapter")
    file = damaged.path / "adapter_model.safetensors"
    flip(file)
    manifest = damaged.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][file.name]["sha256"] = file_sha256(file)
    manifest.write_text(json.dumps(content))
    edit(copy, gate={"min_top1_agreement": 0.9})
    done = ft(copy, "run", "--asset", "merged_model")
    assert done.returncode != 0
    assert "its hashes do not give its data version" in done.stdout + done.stderr
