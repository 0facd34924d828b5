"""The merge from disk to disk: the function of base + adapter, the bits of PEFT's merge."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ft_assets.errors import ArtifactError, ModelError
from ft_assets.merging import merge as merge_module
from ft_assets.merging.merge import merge
from ft_assets.merging.tensor_files import INDEX, entries_of, read_folder, read_tensor

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 3},
        "alpha_pattern": {"k_proj": 3, "layers.0.mlp.up_proj": 20},
    },
    "modules_to_save": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved and tied by wish": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "trained tokens": {"trainable_token_indices": [3, 7, 398]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def base_of(
    folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32, **save: Any
) -> Path:
    """Save a random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, **save)
    return folder


def adapter_of(base: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter with random parameters, so that merging it changes every target."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"),
        LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            | settings
        ),
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "magnitude" in name:
                parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_A" not in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def merged_of(base: Path, adapter: Path, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    merge(base, adapter, folder, **options)
    return folder


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(400).view(10, 40)
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_the_function_that_base_and_adapter_are(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    """In fp32, where rounding hides nothing.

    With a tied head PEFT's own merge changes both sides if the adapter changed one.
    """
    base = base_of(tmp_path / "base", tied)
    adapter = adapter_of(base, tmp_path / "adapter", **KINDS[kind])
    merged = AutoModelForCausalLM.from_pretrained(
        merged_of(base, adapter, tmp_path / "merged"), dtype=torch.float32
    )
    before = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    tuned = logits_of(
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
        )
    )
    assert (tuned - before).abs().max() > 0.05  # the adapter does something
    assert (logits_of(merged) - tuned).abs().max() < 1e-5


@pytest.mark.parametrize(
    "kind", ["LoRA", "rsLoRA", "DoRA", "patterns", "modules_to_save", "trained tokens"]
)
def test_bits_are_those_of_the_merge_by_peft(tmp_path: Path, kind: str) -> None:
    base = base_of(tmp_path / "base", dtype=torch.bfloat16)
    adapter = adapter_of(base, tmp_path / "adapter", **KINDS[kind])
    merged = merged_of(base, adapter, tmp_path / "merged")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), str(adapter)
    ).merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, reference = (
        load_file(merged / "model.safetensors"),
        load_file(tmp_path / "theirs/model.safetensors"),
    )
    assert ours.keys() == reference.keys()
    different = {
        name: int((ours[name] != reference[name]).sum())
        for name in ours
        if not torch.equal(ours[name], reference[name])
    }
    # DoRA divides by a norm, which PEFT sums in another order: the last bit may differ.
    assert different == {} if kind != "DoRA" else sum(different.values()) <= 20
    for name in different:
        assert torch.allclose(ours[name].float(), reference[name].float(), rtol=2**-7, atol=0)


def test_a_sharded_base_keeps_its_shards_and_is_read_back(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tied=True, max_shard_size="150KB")
    adapter = adapter_of(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    merged = merged_of(base, adapter, tmp_path / "merged")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in merged.glob("*.safetensors")) == shards
    index = json.loads((merged / INDEX).read_text())
    assert set(index["weight_map"]) == set(entries_of(read_folder(base))) | {
        "lm_head.weight"
    }  # parted from the embedding
    tuned = logits_of(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    )
    assert (logits_of(AutoModelForCausalLM.from_pretrained(merged)) - tuned).abs().max() < 1e-5


def test_untouched_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="60KB")
    merged = merged_of(
        base,
        adapter_of(base, tmp_path / "adapter", target_modules=r".*layers\.1.*q_proj"),
        tmp_path / "merged",
    )
    changed = [
        path.name
        for path in sorted(base.iterdir())
        if (merged / path.name).read_bytes() != path.read_bytes()
    ]
    assert len(changed) == 1
    assert changed[0].endswith(".safetensors")


def test_blocks_of_rows_do_not_change_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(tmp_path / "base")
    adapter = adapter_of(
        base,
        tmp_path / "adapter",
        use_dora=True,
        target_modules=["q_proj"],
        trainable_token_indices=[5, 390],
    )
    whole = merged_of(base, adapter, tmp_path / "whole")
    monkeypatch.setattr(merge_module, "BLOCK_BYTES", 1000)
    pieces = load_file(merged_of(base, adapter, tmp_path / "pieces") / "model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.allclose(pieces[name], tensor, rtol=1e-6, atol=1e-7), name


def test_fully_trained_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", dtype=torch.bfloat16)
    trained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for parameter in trained.parameters():
        parameter.data.mul_(1.25)
    trained.save_pretrained(tmp_path / "trained")
    (tmp_path / "merged").mkdir()
    assert merge(base, tmp_path / "trained", tmp_path / "merged").method == "copy"
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (
        tmp_path / "trained/model.safetensors"
    ).read_bytes()
    other = base_of(tmp_path / "other", tied=True, dtype=torch.bfloat16)
    with pytest.raises(
        ModelError,
        match=r"1 tensors differ from the base's in name, shape or dtype, e.g. lm_head.weight",
    ):
        merge(other, tmp_path / "trained", tmp_path / "merged")


def truncate(base: Path, adapter: Path) -> None:
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 7)


def quantized(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def packed(base: Path, adapter: Path) -> None:
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(
        {**weights, name: weights[name].to(torch.uint8)},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )


def other_shape(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(
        {
            name: value[:, :32].contiguous() if "lora_A" in name else value
            for name, value in load_file(path).items()
        },
        path,
    )


def not_finite(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(
        {
            name: value * float("nan") if "1.mlp.up_proj.lora_B" in name else value
            for name, value in load_file(path).items()
        },
        path,
    )


def half_a_pair(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(
        {
            name: value
            for name, value in load_file(path).items()
            if "0.mlp.up_proj.lora_B" not in name
        },
        path,
    )


def stranger(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(
        {
            **load_file(path),
            "base_model.model.model.layers.0.mlp.up_proj.lora_X.weight": torch.zeros(2),
        },
        path,
    )


def configured(**settings: Any) -> Callable[[Path, Path], None]:
    def change(base: Path, adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def smaller_base(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 1}
    shutil.rmtree(base)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(base)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"model\.safetensors: is truncated: \d+ bytes"),
        (quantized, r"its weights are stored in 4 bits \(bitsandbytes\)"),
        (packed, "its dtype is U8"),
        (
            other_shape,
            r"model\.safetensors: .*proj\.weight: the adapter's update does not fit the shape",
        ),
        (not_finite, r"layers\.1\.mlp\.up_proj\.weight: the merged weight is not finite"),
        (half_a_pair, r"there is no .*layers\.0\.mlp\.up_proj\.lora_B\.weight"),
        (stranger, r"holds 1 tensors of an unknown kind, e\.g\. .*lora_X\.weight"),
        (smaller_base, "7 modules have no weight in the base"),
        (
            configured(target_parameters=["experts.gate_up_proj"]),
            "cannot be merged: LoRA on parameters of fused experts",
        ),
        (
            configured(init_lora_weights="pissa_niter_4"),
            "starts from other weights than the base's",
        ),
        (configured(peft_type="IA3"), "cannot be merged: peft_type IA3"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path, Path], None], said: str
) -> None:
    base = base_of(tmp_path / "base", dtype=torch.bfloat16)
    adapter = adapter_of(base, tmp_path / "adapter")
    damage(base, adapter)
    with pytest.raises(ModelError, match=said):
        merged_of(base, adapter, tmp_path / "merged")


def test_a_disk_too_small_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The free space is injected: a full disk is not to be had here."""
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ArtifactError, match=r"0\.00 GB free"):
        merged_of(base, adapter, tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == []


MEASURE = """
import sys
from pathlib import Path
from ft_assets.merging.merge import merge
import torch; torch.addmm(torch.ones(64, 64), torch.ones(64, 64), torch.ones(64, 64))
def peak():  # not getrusage: ru_maxrss is inherited from the process that started this one
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before = peak()
merge(*map(Path, sys.argv[1:4]))
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """370 MB of weights, none above 34 MB, go through less than 150 MB of memory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = {
        name: torch.full(tensor.shape, 0.01, dtype=torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    pairs = {}
    for name, tensor in weights.items():
        if "_proj" in name:
            module = name.removesuffix(".weight")
            pairs[f"base_model.model.{module}.lora_A.weight"] = torch.full(
                (8, tensor.shape[1]), 0.01
            )
            pairs[f"base_model.model.{module}.lora_B.weight"] = torch.full(
                (tensor.shape[0], 8), 0.01
            )
    save_file(pairs, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8})
    )
    (tmp_path / "merged").mkdir()
    total = sum(tensor.nbytes for tensor in weights.values())
    del weights
    paths = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True
    )
    assert total > 370_000_000
    assert int(done.stdout) < 150_000_000
    merged = entries_of(read_folder(tmp_path / "merged"))["model.layers.2.mlp.up_proj.weight"]
    assert float(read_tensor(merged)[-1, -1]) == pytest.approx(0.0108, rel=2**-8)
