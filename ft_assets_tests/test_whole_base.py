"""A base whose file lacks a weight, or holds another, is refused before anything is trained."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ft_assets.config import BaseModelSettings
from ft_assets.errors import ModelError
from ft_assets.models.snapshot import write_snapshot
from ft_assets_tests.factories import CHATML, tiny_llama, tiny_tokenizer

NAME = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Any]


def lacking(tensors: Tensors) -> None:
    del tensors[NAME]


def more(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors[NAME].clone()


def other_shape(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME][:-1].clone()


def not_finite(tensors: Tensors) -> None:
    tensors[NAME][3, 5] = float("nan")


def write(folder: Path, output: Path) -> None:
    output.mkdir()
    settings = BaseModelSettings(folder=str(folder))
    write_snapshot("tiny", settings, folder.parent, {}, CHATML, output)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lacking, f"the file lacks: {NAME} (1 in all)"),
        (more, "model.layers.2.mlp.up_proj.weight does not belong to the model"),
        (other_shape, f"{NAME} has another shape than config.json gives"),
        (not_finite, f"{NAME} has values that are not finite"),
    ],
)
def test_damaged_base_is_refused_by_the_name_of_the_weight(
    tiny_model: Path, tmp_path: Path, damage: Callable[[Tensors], None], reason: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    file = folder / "model.safetensors"
    tensors: Tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        write(folder, tmp_path / "snapshot")
    assert reason in str(caught.value)
    assert "base_models.tiny" in str(caught.value)


def test_tied_head_that_is_not_stored_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    write(folder, tmp_path / "snapshot")
    assert (tmp_path / "snapshot/model.safetensors").exists()
