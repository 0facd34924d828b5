"""Test every method of training: adapters of each kind, token rows and all weights.

The metadata has the number of trainable parameters.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from ft_assets.config import LoraSettings, load_project
from ft_assets.errors import TrainingError
from ft_assets.models.adapter_files import is_full
from ft_assets.models.targets import linears_of, target_names
from ft_assets.release.provenance import PROVENANCE
from ft_assets.training import base_products
from ft_assets.training.adapter import trainable_share
from ft_assets.views.board import Opened
from ft_assets.views.versions import versions
from ft_assets_tests.factories import WORDS, edit, write_jsonl
from ft_assets_tests.pipeline import artifact, failure, materialize, read
from ft_assets_tests.training import dpo, same, sft, weights

PRESETS = {
    "attention-qv": ("q", "v"),
    "attention": ("q", "k", "v", "o"),
    "all-linear": ("q", "k", "v", "o", "gate", "up", "down"),
}


def formula(config: Any, rank: int, preset: str, dora: bool = False) -> int:
    """Return the trainable parameters of an adapter of a Llama.

    This is r·(in + out), summed over the targets (Hu et al. 2021). DoRA adds `out` magnitudes.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = {
        "q": (hidden, queries),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "o": (queries, hidden),
    }
    shapes |= {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    return config.num_hidden_layers * sum(
        rank * sum(shapes[name]) + dora * shapes[name][1] for name in PRESETS[preset]
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", ["tiny", "8B"])
def test_trainable_parameters_are_those_of_the_formula(
    preset: str, shape: str, tiny_model: Path
) -> None:
    config: Any = AutoConfig.from_pretrained(tiny_model)
    if shape == "8B":
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        total = sum(weight.numel() for weight in base.parameters())
        model = get_peft_model(
            base,
            LoraConfig(
                r=16, target_modules=target_names(linears_of(base), preset), task_type="CAUSAL_LM"
            ),
        )
    share = trainable_share(model)
    assert share["trainable_parameters"] == formula(config, 16, preset)
    assert share["trainable_percent"] == pytest.approx(
        100 * formula(config, 16, preset) / (total + formula(config, 16, preset)), abs=1e-3
    )


@pytest.mark.parametrize(
    ("lora", "more"),
    [
        ({"use_rslora": True}, 0),
        ({"use_dora": True}, None),
        ({"modules_to_save": ["embed_tokens"]}, 64 * 280),
        ({"trainable_token_indices": ["<|im_start|>", "<|im_end|>"]}, 2 * 64),
    ],
    ids=["rslora", "dora", "modules_to_save", "tokens"],
)
def test_every_kind_of_adapter_trains_and_goes_on_with_dpo(
    lora: dict[str, Any], more: int | None, tiny_model: Path, tmp_path: Path
) -> None:
    config: Any = AutoConfig.from_pretrained(tiny_model)
    expected = formula(config, 4, "all-linear", dora="use_dora" in lora)
    if "modules_to_save" in lora:
        more = config.vocab_size * config.hidden_size
    metrics = sft(tiny_model, tmp_path / "sft", lora=lora, num_train_epochs=1)
    assert metrics["trainable_parameters"] == expected + (more or 0)
    assert metrics["largest_update"] > 0
    after = dpo(
        tiny_model, tmp_path / "sft/output", tmp_path / "dpo", lora=lora, num_train_epochs=1
    )
    assert after["reference_difference"] <= 1e-3
    names = set(weights(tmp_path / "sft/output"))
    assert set(weights(tmp_path / "dpo/output")) == names
    assert {tensor.dtype for tensor in weights(tmp_path / "dpo/output").values()} == {torch.float32}
    assert not same(tmp_path / "sft/output", tmp_path / "dpo/output")
    if "modules_to_save" in lora:
        assert any("embed_tokens.weight" in name for name in names)
    if "trainable_token_indices" in lora:
        saved = json.loads((tmp_path / "sft/output/adapter_config.json").read_text())[
            "trainable_token_indices"
        ]
        assert sorted(saved["embed_tokens"] if isinstance(saved, dict) else saved) == [1, 2]


def test_token_that_does_not_exist_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError,
        match=r"trainable_token_indices: '<\|im_sart\|>' is not a token"
        r"[\s\S]*did you mean '<\|im_start\|>'",
    ):
        sft(tiny_model, tmp_path, lora={"trainable_token_indices": ["<|im_sart|>"]})
    with pytest.raises(
        TrainingError,
        match=r"modules_to_save: the model has no module embed_token[\s\S]*embed_tokens",
    ):
        sft(tiny_model, tmp_path, lora={"modules_to_save": ["embed_token"]})


def test_adapter_settings_with_full_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="use_dora only has a meaning with an adapter"):
        LoraSettings(method="full", use_dora=True)


def test_qlora_on_a_cpu_runs_through_bitsandbytes_and_its_gradients_are_real(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test that the weights are NF4, and that no inference pass of bitsandbytes runs on them.

    On CPUs with AVX512-BF16, such a pass makes every LoRA gradient 0.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    seen, quantized = [], []
    real, read = bitsandbytes.nn.Linear4bit.forward, base_products.dense_weight

    def recorded(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(self.training)
        return real(self, x)

    def recorded_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
        quantized.append(getattr(layer.weight, "quant_state", None) is not None)
        return read(layer, dtype)

    monkeypatch.setattr(base_products, "dense_weight", recorded_weight)
    bitsandbytes.nn.Linear4bit.forward = recorded
    try:
        metrics = sft(tiny_model, tmp_path / "sft", lora={"method": "qlora"}, num_train_epochs=2)
        after = dpo(
            tiny_model,
            tmp_path / "sft/output",
            tmp_path / "dpo",
            lora={"method": "qlora"},
            num_train_epochs=1,
        )
    finally:
        bitsandbytes.nn.Linear4bit.forward = real
    assert quantized
    assert all(quantized)
    assert all(seen)  # never in inference mode
    updates = [
        float(weight.abs().max())
        for name, weight in weights(tmp_path / "sft/output").items()
        if "lora_B" in name
    ]
    assert len(updates) == 14
    assert min(updates) > 0
    why = "bitsandbytes' inference pass on a CPU would spoil the weights for training"
    assert metrics["kept_why"] == f"the last step: no validation loss was measured: {why}"
    assert (
        metrics["trainable_percent"] < 100 * 8192 / 120512
    )  # a 4-bit weight counts each of its numbers
    assert after["reference_difference"] <= 1e-3


def test_dpo_on_an_nf4_base_trains_the_sft_adapter_in_fp32(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Test that DPO trains in fp32.

    bf16 has no number between 0.1 and 0.1005, so almost no weight would move at its learning rate.
    """
    pytest.importorskip("bitsandbytes")
    lora, rate, steps = {"method": "qlora"}, 5e-6, 6
    sft(tiny_model, tmp_path / "sft", lora=lora, num_train_epochs=1)
    metrics = dpo(
        tiny_model,
        tmp_path / "sft/output",
        tmp_path / "dpo",
        lora=lora,
        learning_rate=rate,
        lr_scheduler_type="constant",
    )
    assert (metrics["steps"], metrics["method"]) == (steps, "qlora")
    before, after = weights(tmp_path / "sft/output"), weights(tmp_path / "dpo/output")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    for kind in ("lora_A", "lora_B"):
        moved = torch.cat(
            [(after[name] - before[name]).abs().flatten() for name in before if kind in name]
        )
        assert float((moved > 0).float().mean()) > 0.9, kind
        # DPO starts from the adapter itself, not from a copy in bf16.
        assert float(moved.max()) < 2 * steps * rate, kind


def test_full_weights_resume_and_dpo_starts_from_them(tiny_model: Path, tmp_path: Path) -> None:
    lora, settings = {"method": "full"}, {"learning_rate": 1e-3, "num_train_epochs": 1}
    metrics = sft(tiny_model, tmp_path / "sft", lora=lora, **settings)
    assert metrics["trainable_percent"] == 100
    assert is_full(tmp_path / "sft/output")
    assert {tensor.dtype for tensor in weights(tmp_path / "sft/output").values()} == {
        torch.bfloat16
    }
    for old in (tmp_path / "sft/checkpoints").glob("checkpoint-5"):
        (old / "whole.json").unlink()
    (tmp_path / "again/output").mkdir(parents=True)
    (tmp_path / "sft/checkpoints").rename(tmp_path / "again/checkpoints")
    assert sft(tiny_model, tmp_path / "again", lora=lora, **settings)["resumed_from_step"] == 4
    assert same(tmp_path / "again/output", tmp_path / "sft/output")
    after = dpo(
        tiny_model, tmp_path / "sft/output", tmp_path / "dpo", lora=lora, learning_rate=1e-4
    )
    assert after["reference_difference"] <= 1e-3
    assert not same(tmp_path / "dpo/output", tmp_path / "sft/output")


def test_full_weights_go_through_the_whole_graph(healthy: Callable[..., Path]) -> None:
    project = healthy(
        lora={"method": "full"},
        sft={"learning_rate": 1e-3, "num_train_epochs": 6, "effective_batch": 8, "micro_batch": 8},
    )
    # SFT continues from documents, so that the graph with that stage is whole too.
    text = ", ".join(WORDS)
    (project / "notes.md").write_text(text)
    write_jsonl(project / "data/notes.jsonl", [{"text": f"{n} {text}"} for n in range(3)])
    edit(
        project,
        data={"text": ["notes.md", "data/notes.jsonl"]},
        text={"learning_rate": 1e-4, "num_train_epochs": 4, "effective_batch": 2, "micro_batch": 2},
    )
    result = materialize(project)
    assert result.success, failure(result)
    proofs = read(project, "eval_report", "report.json")["proofs"]["adapters"]["sft"]
    assert proofs["changed"] > 0
    assert proofs["logit_change"] > 0
    trained = weights(artifact(project, "lora_adapter"))
    documents = read(project, "text_adapter", "manifest.json")["data_version"]
    assert read(project, "lora_adapter", "manifest.json")["inputs"]["text_adapter"] == documents
    card = (artifact(project, "merged_model") / "README.md").read_text()
    assert "text bits per byte after" in card
    assert "`text.learning_rate` | `0.0001`" in card
    (version,) = versions(Opened.of(load_project(project / "finetune.yaml")), "tiny").found
    stages = ("text_adapter", "lora_adapter", "dpo_adapter", "answers", "eval_report")
    took = [read(project, stage, "manifest.json") for stage in stages]
    assert version.seconds == pytest.approx(sum(one["finished"] - one["started"] for one in took))
    assert "raw_text/manifest.json" in (artifact(project, "merged_model") / PROVENANCE).read_text()
    merged = weights(artifact(project, "merged_model"))
    assert all(bool((trained[name] == merged[name]).all()) for name in trained)
    assert read(project, "eval_report", "verdict.json")["status"] == "PASS"
