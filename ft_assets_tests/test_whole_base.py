"""A base that is not whole is refused before anything is trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from safetensors.torch import load_file, save_file

from ft_assets.config import BaseModelSettings
from ft_assets.errors import ModelError
from ft_assets.export.gguf import write_gguf
from ft_assets.models.snapshot import write_snapshot
from ft_assets_tests.factories import CHATML, tiny_llama, tiny_tokenizer

NAME, HEAD, EMBEDDING = (
    "model.layers.1.mlp.up_proj.weight",
    "lm_head.weight",
    "model.embed_tokens.weight",
)
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX = "model.safetensors.index.json"
COMMIT = "0123456789" * 4
Tensors = dict[str, Any]
Damage = Callable[[Tensors], Any]


def lacking(tensors: Tensors) -> None:
    del tensors[NAME]


def more(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors[NAME].clone()


def other_shape(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME][:-1].clone()


def not_finite(tensors: Tensors) -> None:
    tensors[NAME][3, 5] = float("nan")


def integers(tensors: Tensors) -> None:
    tensors[NAME] = (tensors[NAME] * 100).to(torch.int8)


def eight_bits(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME].to(torch.float8_e4m3fn)
    tensors[f"{NAME}_scale_inv"] = torch.ones(1)


def write(folder: Path, output: Path, **source: Any) -> None:
    output.mkdir()
    settings = BaseModelSettings(**(source or {"folder": str(folder)}))
    identity: Any = {"commit": COMMIT} if settings.hub else {}
    write_snapshot("tiny", settings, folder.parent, identity, CHATML, output)


def refused(folder: Path, **source: Any) -> str:
    with pytest.raises(ModelError) as caught:
        write(folder, folder.parent / "snapshot", **source)
    assert "base_models.tiny" in str(caught.value)
    return " ".join(str(caught.value).split())


def change(folder: Path, damage: Damage) -> None:
    tensors: Tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lacking, f"the file lacks {NAME} (1 in all)"),
        (more, "is not in the model of its config: model.layers.2.mlp.up_proj.weight"),
        (other_shape, f"has another shape than its config gives: {NAME}"),
        (not_finite, f"has values that are not finite in {NAME}"),
        (integers, f"weights in another type than 16- to 64-bit floating point: {NAME} (I8)"),
        (eight_bits, f"{NAME} (F8_E4M3)"),
        (lambda tensors: tensors.pop(HEAD), f"the file lacks {HEAD}"),
    ],
)
def test_damaged_base_is_refused_by_the_name_of_the_weight(
    base: Path, damage: Damage, reason: str
) -> None:
    change(base, damage)
    assert reason in refused(base)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"num_hidden_layers": 4}, "the file lacks model.layers.2.input_layernorm.weight"),
        (
            {"num_hidden_layers": 1},
            "not in the model of its config: model.layers.1.input_layernorm",
        ),
        ({"num_hidden_layers": -1}, "not in the model of its config: model.layers.0.input_layer"),
        ({"vocab_size": 300}, f"another shape than its config gives: {HEAD}, {EMBEDDING}"),
        (
            {"tie_word_embeddings": True},
            f"ties weights that differ in its file: {HEAD} and {EMBEDDING}",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "its weights are stored quantized (fp8)",
        ),
    ],
)
def test_config_of_another_model_than_the_weights_is_refused(
    base: Path, keys: dict[str, Any], reason: str
) -> None:
    configure(base, **keys)
    assert reason in refused(base)


def split(folder: Path, twice: bool = False) -> dict[str, str]:
    """Write the model as two shards with an index; `twice`: the second has all tensors."""
    tensors: Tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    for file, held in zip(SHARDS, (first, names if twice else second), strict=True):
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    listed = dict.fromkeys(first, SHARDS[0]) | dict.fromkeys(second, SHARDS[1])
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return listed


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({NAME: SHARDS[0]}, f"not in its file: {NAME}"),
        ({"another.weight": SHARDS[1]}, "not in its file: another.weight"),
        ({NAME: None}, f"not in the index: {NAME}"),
    ],
)
def test_index_that_lists_other_tensors_than_its_files_is_refused(
    base: Path, entry: dict[str, str | None], reason: str
) -> None:
    listed = {**split(base), **entry}
    kept = {name: file for name, file in listed.items() if file}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    assert reason in refused(base)


def test_weights_that_are_there_twice_are_refused(base: Path, tiny_model: Path) -> None:
    split(base, twice=True)
    assert f"{HEAD}, {EMBEDDING}" in (reason := refused(base)) and "in two files" in reason
    shutil.rmtree(base.parent / "snapshot")
    shutil.copy(base / SHARDS[1], base / "model-00003-of-00003.safetensors")
    assert "does not list model-00003-of-00003.safetensors" in refused(base)
    shutil.rmtree(base.parent / "snapshot")
    shutil.copy(tiny_model / "model.safetensors", base)
    assert "has model.safetensors and shards (3 files, index: True)" in refused(base)


def test_whole_base_is_accepted_in_each_form(base: Path, tmp_path: Path) -> None:
    split(base)
    write(base, tmp_path / "sharded")
    tensors: Tensors = {}
    for file in SHARDS:
        tensors |= load_file(base / file)
        (base / file).unlink()
    (base / INDEX).unlink()
    # Old files have the rotary frequencies of each layer, and a tied head beside its embedding.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors[HEAD] = tensors[EMBEDDING]
    configure(base, tie_word_embeddings=True)
    torch.save(tensors, base / "pytorch_model.bin")
    write(base, tmp_path / "pickled")
    torch.save({**tensors, NAME: tensors[NAME].to(torch.int16)}, base / "pytorch_model.bin")
    assert f"{NAME} (I16)" in refused(base)


def test_base_of_the_hub_is_checked_as_a_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = cache / "models--some--model" / "snapshots" / COMMIT
    split(base)
    shutil.copytree(base, snapshot)
    write(base, tmp_path / "whole", hub="some/model")
    split_twice = json.loads((snapshot / INDEX).read_text())
    split_twice["weight_map"][NAME] = SHARDS[0]
    (snapshot / INDEX).write_text(json.dumps(split_twice))
    assert f"not in its file: {NAME}" in refused(base, hub="some/model")


def rewrite(source: Path, target: Path, layers: int, more: bool) -> None:
    """Copy a GGUF file with another number of layers, or with a tensor of scaled positions."""
    reader, writer = GGUFReader(source), GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = layers if name == "llama.block_count" else field.contents()
        kind = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    if more:
        writer.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_with_tensors_that_are_not_read_is_refused(base: Path, tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.gguf", tmp_path / "tiny.gguf"
    write_gguf(base, whole, "f16", "tiny", None)
    rewrite(whole, file, layers=2, more=False)
    write(base, tmp_path / "accepted", gguf=str(file))
    for layers, more, reason in (
        (1, False, "does not read from GGUF: blk.1.attn_k.weight"),
        (2, True, "does not read from GGUF: rope_freqs.weight (1 in all)"),
        (4, False, "the file lacks model.layers.2.input_layernorm.weight"),
    ):
        rewrite(whole, file, layers, more)
        assert reason in refused(base, gguf=str(file))
        shutil.rmtree(tmp_path / "snapshot")
    file.write_bytes(whole.read_bytes()[:-5000])
    reason = refused(base, gguf=str(file))
    assert "tiny.gguf cannot be loaded" in reason and "trust_remote_code" not in reason


def test_tied_head_that_is_not_stored_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    write(folder, tmp_path / "snapshot")
    assert (tmp_path / "snapshot/model.safetensors").exists()


def test_pad_token_beyond_the_embedding_is_refused_with_what_helps(
    base: Path, tmp_path: Path
) -> None:
    configure(base, pad_token_id=5000)
    assert "take pad_token_id out of config.json" in refused(base)
    configure(base, pad_token_id=None)
    write(base, tmp_path / "accepted")
