"""The text part of a model that also sees is trained, and written back into the whole model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ft_assets.config import BaseModelSettings, LoraSettings
from ft_assets.errors import FtError, ModelError
from ft_assets.merging.audit import audit
from ft_assets.merging.merge import merge
from ft_assets.merging.other_parts import other_parts
from ft_assets.models import text_part
from ft_assets.models.loading import load_base
from ft_assets.models.snapshot import SnapshotFacts, write_snapshot
from ft_assets.models.source import source_identity
from ft_assets.models.text_part import FILE
from ft_assets.training.adapter import new_adapter, save_trained
from ft_assets_tests.factories import tiny_tokenizer
from ft_assets_tests.families import WHOLES, family_model, whole_model

TAKEN = [name for name in WHOLES if name != "qwen3_vl"]
IDS = torch.arange(220, 260)[None]


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def snapshot(folder: Path, output: Path) -> SnapshotFacts:
    settings = BaseModelSettings(folder=str(folder))
    output.mkdir()
    identity = source_identity("base", settings, folder)
    return write_snapshot("base", settings, folder, identity, None, output)


def trained(base: Path, output: Path, targets: str | list[str] = "all-linear") -> Path:
    """Save an adapter with a random update of every target."""
    settings = LoraSettings.model_validate({"r": 4, "target_modules": targets})
    model = new_adapter(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    output.mkdir()
    save_trained(model, output)
    return output


@pytest.mark.parametrize("name", TAKEN)
def test_adapter_of_the_text_part_is_merged_into_the_whole(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", whole_model(name))
    base, merged = tmp_path / "base", tmp_path / "merged"
    facts = snapshot(source, base)
    before = load_file(source / "model.safetensors")
    whole = type(whole_model(name)).__name__
    assert facts["text_part"].startswith(f"text part of {whole}, ")
    assert facts["text_part"].endswith(f" of {len(before)} tensors")
    adapter = trained(base, tmp_path / "adapter")
    merged.mkdir()
    merge(base, adapter, merged)
    after = load_file(merged / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    named = set(json.loads((base / FILE).read_text())["names"].values())
    assert before.keys() == after.keys()
    assert changed
    assert changed < named
    others = other_parts(base, merged)
    assert (others.tensors, others.changed) == (len(before) - len(named), [])
    tuned = PeftModel.from_pretrained(load_base(base, dtype=torch.float32), str(adapter)).eval()
    result = audit(tuned, base, merged)
    assert (result.faults, result.modules) == ([], result.adapter_modules)
    with torch.no_grad():
        wanted, unchanged, text, read = (
            model.eval()(input_ids=IDS).logits
            for model in (
                tuned,
                load_base(base, dtype=torch.float32),
                load_base(merged, dtype=torch.float32),
                getattr(transformers, whole).from_pretrained(merged, dtype=torch.float32),
            )
        )
    torch.testing.assert_close(read, text)
    # The merged weights are rounded to bf16.
    assert (text - wanted).abs().mean() < 0.1 * (unchanged - wanted).abs().mean()


def test_changed_other_part_is_named(tmp_path: Path) -> None:
    source = save(tmp_path / "source", whole_model("mistral3"))
    snapshot(source, tmp_path / "base")
    merged = tmp_path / "merged"
    merged.mkdir()
    tensors = load_file(tmp_path / "base/model.safetensors")
    seen = next(key for key in tensors if "vision" in key)
    save_file(tensors | {seen: tensors[seen] + 1}, merged / "model.safetensors")
    assert other_parts(tmp_path / "base", merged).changed == [seen]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"method": "full"}, r"lora\.method: full"),
        ({"modules_to_save": ["embed_tokens"]}, r"lora\.modules_to_save"),
    ],
)
def test_what_cannot_be_written_back_is_refused(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    snapshot(save(tmp_path / "source", whole_model("mistral3")), tmp_path / "base")
    with pytest.raises(FtError, match=named + ".* also sees or hears"):
        new_adapter(tmp_path / "base", LoraSettings.model_validate(settings))


def test_qlora_quantizes_the_text_part(tmp_path: Path) -> None:
    snapshot(save(tmp_path / "source", whole_model("gemma3")), tmp_path / "base")
    settings = LoraSettings.model_validate({"method": "qlora", "r": 4})
    model = new_adapter(tmp_path / "base", settings)
    kinds = {type(module).__name__ for module in model.get_base_model().modules()}
    assert "Linear4bit" in kinds
    assert model(input_ids=IDS, labels=IDS).loss.requires_grad


def test_text_part_without_a_class_of_its_own_is_refused_with_true_advice(tmp_path: Path) -> None:
    source = save(tmp_path / "source", whole_model("qwen3_vl"))
    with pytest.raises(ModelError, match=r"(?s)Qwen3VLConfig has a text part .* text-only base"):
        snapshot(source, tmp_path / "base")


def test_text_part_that_answers_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that the whole calls with something that the text class does not have."""
    source = save(tmp_path / "source", whole_model("mistral3"))
    made = text_part.text_class

    def scaled(where: str, config: Any) -> Any:
        class Other(made(where, config)):
            def forward(self, **inputs: Any) -> Any:
                outputs = super().forward(**inputs)
                outputs.logits = outputs.logits.flip(1)
                return outputs

        return Other

    monkeypatch.setattr(text_part, "text_class", scaled)
    with pytest.raises(ModelError, match=r"logits of Other differ .* of their spread"):
        snapshot(source, tmp_path / "base")


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_text_model_alone_is_taken(tmp_path: Path, method: str) -> None:
    source = save(tmp_path / "source", family_model("gemma3_text").to(torch.bfloat16))
    facts = snapshot(source, tmp_path / "base")
    assert "text_part" not in facts
    settings = LoraSettings.model_validate({"method": method, "target_modules": "all-linear"})
    model = new_adapter(tmp_path / "base", settings)
    assert sum(parameter.requires_grad for parameter in model.parameters()) > 0


def test_experts_of_a_mixture_get_no_adapter(tmp_path: Path) -> None:
    """Their files have one matrix an expert, the model has one tensor of all."""
    snapshot(save(tmp_path / "source", family_model("qwen3_moe")), tmp_path / "base")
    adapter = trained(tmp_path / "base", tmp_path / "adapter")
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    merged = tmp_path / "merged"
    merged.mkdir()
    merge(tmp_path / "base", adapter, merged)
    tuned = PeftModel.from_pretrained(load_base(tmp_path / "base"), str(adapter))
    assert audit(tuned, tmp_path / "base", merged).faults == []
    with pytest.raises(FtError, match="one tensor for all"):
        trained(tmp_path / "base", tmp_path / "other", ["q_proj", "gate_proj"])
