"""A model whose weights have other names in its files than in memory is refused before training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
)

from ft_assets.config import BaseModelSettings, LoraSettings
from ft_assets.errors import ModelError
from ft_assets.models.snapshot import write_snapshot
from ft_assets.models.source import source_identity
from ft_assets.training.adapter import new_adapter
from ft_assets_tests.factories import tiny_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 64,
}
PICTURES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save(folder: Path, pictures: bool) -> Path:
    """Save a tiny Gemma 3: of the class of 4B to 27B, or the text model alone."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model: PreTrainedModel = (
        Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=PICTURES, mm_tokens_per_image=4)
        )
        if pictures
        else Gemma3ForCausalLM(Gemma3TextConfig(**text))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def snapshot(folder: Path, output: Path) -> Path:
    settings = BaseModelSettings(folder=str(folder))
    output.mkdir()
    write_snapshot(
        "gemma", settings, folder, source_identity("gemma", settings, folder), None, output
    )
    return output


def test_gemma_3_with_pictures_is_refused_where_it_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "gemma", pictures=True)
    memory = dict(AutoModelForCausalLM.from_pretrained(folder).named_modules())
    assert (
        "model.language_model.layers.0.self_attn.q_proj" in memory
    )  # else transformers renames no more, and nothing is to be refused
    with pytest.raises(
        ModelError,
        match=r"base_models\.gemma: Gemma3ForConditionalGeneration: .* weights to train have other "
        r"names",
    ) as error:
        snapshot(folder, tmp_path / "snapshot")
    assert "Gemma3ForCausalLM" in str(error.value)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_its_adapter_is_refused_before_it_is_trained(tmp_path: Path, method: str) -> None:
    """Also for a snapshot that was made before such bases were refused, or with some renames."""
    folder = save(tmp_path / "gemma", pictures=True)
    with pytest.raises(
        ModelError, match=r"Gemma3ForConditionalGeneration: .* other names in its files"
    ):
        new_adapter(folder, LoraSettings.model_validate({"method": method}))


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_its_text_model_alone_is_taken(tmp_path: Path, method: str) -> None:
    base = snapshot(save(tmp_path / "gemma", pictures=False), tmp_path / "snapshot")
    settings = LoraSettings.model_validate({"method": method, "target_modules": "all-linear"})
    assert (
        sum(parameter.requires_grad for parameter in new_adapter(base, settings).parameters()) > 0
    )
