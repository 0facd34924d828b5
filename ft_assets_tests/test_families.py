"""One family in full, and the table of all families in docs/models.md."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bench.models import STEPS, run
from ft_assets.config import LoraSettings
from ft_assets.errors import ModelError, TrainingError
from ft_assets.models.padding import padding_token
from ft_assets.models.targets import (
    linears_of,
    linears_of_config,
    require_targets,
    save_linears,
    target_names,
)
from ft_assets.training.dry_run import try_base
from ft_assets_tests.families import FAMILIES, SIZES, WHOLES, WINDOW, family_model

DOCS = Path(__file__).parents[1] / "docs" / "models.md"


def test_hybrid_that_also_sees_goes_through_every_step(tmp_path: Path) -> None:
    """Its linear attention reads each document alone; it would see the other answer of a pair."""
    found = {(step, target): cell for step, target, cell in run("qwen3_5", tmp_path)}
    for target in ("attention", "all-linear"):
        marks = [found[step, target].mark for step in STEPS]
        assert marks == ["✓", "✓", "✓", "✓", "–", "✓", "✓", "✗"], found
        assert "is not one of" in found["GGUF", target].reason


def test_table_has_every_family_and_no_crash() -> None:
    text = DOCS.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert listed == [*FAMILIES, *WHOLES]
    assert len(listed) >= 25
    assert "CRASH" not in text


def test_config_tells_before_its_weights_are_read_whether_a_base_can_be_trained(
    tmp_path: Path,
) -> None:
    AutoConfig.for_model("phi3", **{**SIZES, **FAMILIES["phi3"]}).save_pretrained(tmp_path)
    found = linears_of_config("base_models.mine", tmp_path)
    assert target_names(found, "attention") == ["o_proj", "qkv_proj"]
    text, rest = WHOLES["qwen3_vl"]
    parts = {"model_type": text, **SIZES, **FAMILIES[text]}
    AutoConfig.for_model("qwen3_vl", text_config=parts, **rest).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="without a causal language model of its own"):
        linears_of_config("base_models.mine", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "of_next_year"}')
    with pytest.raises(ModelError, match="of_next_year"):
        linears_of_config("base_models.mine", tmp_path)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("qwen3", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("phi3", ["o_proj", "qkv_proj"]),
        ("gpt_neox", ["dense", "query_key_value"]),
        ("gpt2", ["attn.c_proj", "c_attn"]),  # the MLP has a c_proj too
        ("lfm2", ["k_proj", "q_proj", "self_attn.out_proj", "v_proj"]),  # and the convolution
        ("mamba2", None),
    ],
)
def test_attention_is_the_layers_of_attention_by_any_name(
    family: str, attention: list[str] | None, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
        )
    save_linears(linears_of(model), tmp_path)
    with pytest.raises(TrainingError, match=r"has no linear layer no_such_layer"):
        require_targets(tmp_path, LoraSettings(target_modules=["no_such_layer"]))
    if attention is None:
        with pytest.raises(TrainingError, match="has no layers of attention") as refused:
            require_targets(tmp_path, LoraSettings(target_modules="attention"))
        assert refused.value.fix.startswith("set lora.target_modules: all-linear")
        require_targets(tmp_path, LoraSettings(target_modules="all-linear"))
        return
    assert target_names(linears_of(model), "attention") == attention
    require_targets(tmp_path, LoraSettings(target_modules="attention"))


def test_base_whose_layers_fail_in_a_step_is_refused_before_it_is_stored(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = shutil.copytree(tiny_model, tmp_path / "base")
    assert try_base("base_models.tiny", snapshot, LoraSettings()) is None
    assert (snapshot / "info" / "linears.json").is_file()

    def fails(*_: Any, **__: Any) -> Any:
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    with monkeypatch.context() as patched:
        patched.setattr(LlamaDecoderLayer, "forward", fails)
        with pytest.raises(ModelError, match=r"a training step and an answer of Llama.* fail"):
            try_base("base_models.tiny", snapshot, LoraSettings())
    head = load_file(snapshot / "model.safetensors")
    name = next(name for name in head if name.endswith("norm.weight"))
    save_file({**head, name: head[name] * float("inf")}, snapshot / "model.safetensors")
    with pytest.raises(ModelError, match=r"the loss of a step is nan"):
        try_base("base_models.tiny", snapshot, LoraSettings())


def test_filled_places_do_not_spoil_the_gradient_of_gemma_3n() -> None:
    """Its embedding of the pad token is zero, and it divides by the norm of each place."""
    model = family_model("gemma3n_text")
    pad = model.config.pad_token_id
    with torch.no_grad():
        model.get_input_embeddings().weight[pad] = 0
    tokenizer = SimpleNamespace(pad_token_id=pad)
    finite = {}
    for token in (pad, padding_token(model, tokenizer)):
        ids = torch.tensor([[*[token] * WINDOW, 9, 8, 7]])
        mask = torch.tensor([[*[0] * WINDOW, 1, 1, 1]])
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask).logits[0, -3:].float().sum().backward()
        weights = model.model.layers[0].self_attn.q_proj.weight
        finite[token] = bool(torch.isfinite(weights.grad).all())
    assert finite.pop(pad) is False  # else this test shows nothing
    assert list(finite.values()) == [True]
