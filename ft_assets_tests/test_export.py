"""Serving forms: what is written is read back by others, answers as the merged model does, and what cannot be made is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from ft_assets.assets.export import verdict_on_forms
from ft_assets.errors import ReleaseError
from ft_assets.models.loading import load_tokenizer
from ft_assets.release import readers
from ft_assets.release.export_gguf import interleaved, llama3_factors, why_not, write_gguf
from ft_assets.release.forms import make_form
from ft_assets.release.gguf_tokenizer import pre_tokenizer_name
from ft_assets.release.ollama import Pieces, modelfile, pieces_of
from ft_assets_tests.conftest import CHATML, edit
from ft_assets_tests.pipeline import artifact, checks, failure, general, materialize, read

ROLES = ("system", "user", "assistant")
ASKED = [row["messages"][:-1] for row in general(8)]


@pytest.fixture(scope="module")
def gguf(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    files = {kind: folder / f"tiny-{kind}.gguf" for kind in ("f16", "q8_0")}
    for kind, file in files.items():
        write_gguf(taught_model, file, kind, "tiny", "apache-2.0")
    return files


def test_weights_read_back_by_the_gguf_package_are_the_models(gguf: dict[str, Path], taught_model: Path) -> None:
    weights = load_file(taught_model / "model.safetensors")
    found = {tensor.name: tensor for tensor in GGUFReader(gguf["f16"]).tensors}
    assert len(found) == len(weights)
    query = found["blk.1.attn_q.weight"].data.reshape(64, 64)
    np.testing.assert_array_equal(query, interleaved(weights["model.layers.1.self_attn.q_proj.weight"], 4).half().numpy())
    np.testing.assert_array_equal(found["blk.0.attn_norm.weight"].data, weights["model.layers.0.input_layernorm.weight"].float().numpy())
    np.testing.assert_array_equal(found["token_embd.weight"].data.reshape(-1, 64), weights["model.embed_tokens.weight"].half().numpy())


def test_template_stop_tokens_and_vocabulary_are_carried_over(gguf: dict[str, Path], taught_model: Path, tmp_path: Path) -> None:
    assert all(readers.carried_over(gguf["q8_0"], taught_model).values())
    other = shutil.copytree(taught_model, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 0]}))
    lost = readers.carried_over(gguf["q8_0"], other)
    assert (lost["template"], lost["stop_tokens"], lost["tokens"]) == (False, False, True)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_gguf_answers_as_the_model_by_transformers_own_loader(gguf: dict[str, Path], taught_model: Path, kind: str) -> None:
    expected = readers.by_merged(taught_model, ASKED, 8)
    assert len(set(expected)) > 3  # it has been taught: answers differ from prompt to prompt
    assert readers.agreement(expected, readers.by_transformers_gguf(gguf[kind], ASKED, 8)) >= 0.9


def test_wrongly_ordered_query_rows_are_noticed(taught_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ft_assets.release.export_gguf.interleaved", lambda tensor, heads: tensor)
    write_gguf(taught_model, tmp_path / "bad.gguf", "f16", "tiny", None)
    expected = readers.by_merged(taught_model, ASKED, 8)
    assert readers.agreement(expected, readers.by_transformers_gguf(tmp_path / "bad.gguf", ASKED, 8)) < 0.9


def test_llama_3_frequencies_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    ours = llama3_factors({"rope_parameters": rope, "head_dim": 128})
    np.testing.assert_allclose(plain.numpy() / ours, scaled.numpy(), rtol=1e-5)
    assert ours.max() == 8.0
    assert ours.min() == 1.0


def test_other_architectures_are_refused_by_name(taught_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(taught_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["Gemma3ForCausalLM"]}))
    assert "Gemma3ForCausalLM is not one of" in str(why_not(other))
    with pytest.raises(ReleaseError, match=r"release\.llama_cpp"):
        write_gguf(other, tmp_path / "x.gguf", "f16", "x", None)


def test_unknown_pre_tokenizer_is_refused_not_guessed() -> None:
    model = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+"}}}
    with pytest.raises(ReleaseError, match="pre-tokenizer is not one"):
        pre_tokenizer_name(model, "here")
    with pytest.raises(ReleaseError, match="byte fallback"):
        pre_tokenizer_name({"model": {"type": "BPE", "byte_fallback": True}}, "here")


def test_modelfile_writes_the_template_for_go_and_stops_where_the_model_does(gguf: dict[str, Path], taught_model: Path) -> None:
    text, why_not = modelfile("tiny.gguf", taught_model, ASKED, readers.adds_bos(gguf["f16"]))
    assert why_not is None
    assert text.startswith("FROM ./tiny.gguf\n")
    assert f'PARAMETER stop "{load_tokenizer(taught_model).eos_token}"' in text
    around = [f'"{role}" }}}}{{{{ "<|im_start|>{role}\\n" }}}}{{{{ .Content }}}}{{{{ "<|im_end|>\\n" }}}}' for role in ROLES]
    branches = "{{ if eq .Role " + "{{ else if eq .Role ".join(around)
    assert f'TEMPLATE """{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{{{{ "<|im_start|>assistant\\n" }}}}"""\n' in text


def write_of(template: str) -> Any:
    """Return a template as `pieces_of` takes it."""
    from jinja2 import Template

    compiled = Template(template, keep_trailing_newline=True)
    return lambda messages, prompt: compiled.render(messages=messages, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    ("template", "asked", "provable"),
    [
        (CHATML, ASKED, True),
        ("{% if messages[0].role != 'system' %}<s>Be kind.</s>{% endif %}" + CHATML, ASKED, True),
        ("{% if messages|length > 6 %}long{% endif %}" + CHATML, [[*ASKED[0], {"role": "assistant", "content": "x"}] * 4], False),
        (CHATML, [[*ASKED[0], *ASKED[1]]], False),  # Ollama joins two turns of one role
        (CHATML.replace("message['content']", "message['content']|upper"), ASKED, False),
        ("{% for m in messages %}[{{ loop.index }}]{{ m.role + m.content }}{% endfor %}", ASKED, False),
    ],
)
def test_template_is_written_for_ollama_only_where_it_is_proven_equal(template: str, asked: Any, provable: bool) -> None:
    found = pieces_of(write_of(template), asked)
    assert isinstance(found, Pieces) is provable
    if isinstance(found, Pieces):
        turns = [{"role": role, "content": "{{ ä }}\n"} for role in (*ROLES, "user")]
        for messages in (turns, turns[1:], *asked):
            assert found.render(messages) == write_of(template)(messages, True)


def test_modelfile_of_another_template_says_that_ollama_does_not_use_it(taught_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(taught_model, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{% for m in messages %}[{{ loop.index }}]{{ m.role + m.content }}{% endfor %}")
    facts = {"name": "tiny", "license": None, "llama_cpp": None, "base": "tiny", "asked": ASKED}
    made = make_form("gguf-f16", other, other, None, tmp_path / "out", facts)
    text = (tmp_path / "out/Modelfile").read_text()
    assert "\nTEMPLATE" not in text
    assert "# No TEMPLATE: the model's chat template is not constant text" in text
    assert "llama-server -m tiny-F16.gguf --jinja" in text
    assert made["serve"] == ["llama-server -m tiny-F16.gguf --jinja"]
    assert "not for Ollama" in made["notes"][0]


def test_bos_is_written_by_the_template_or_by_the_file_but_not_twice(taught_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(taught_model, tmp_path / "other")
    tokenizer = load_tokenizer(other)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.save_pretrained(other)
    assert '{{ "<|endoftext|>" }}' in modelfile("x.gguf", other, ASKED, adds_bos=False)[0]
    assert "<|endoftext|>" not in modelfile("x.gguf", other, ASKED, adds_bos=True)[0]
    assert "does not say whether BOS" in str(modelfile("x.gguf", other, ASKED, adds_bos=None)[1])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(other)
    assert "the template writes none" in str(modelfile("x.gguf", other, ASKED, adds_bos=True)[1])


@pytest.mark.parametrize(("form", "says"), [("awq", "llmcompressor"), ("gguf-q4_k_m", "llama-quantize"), ("adapter", "adapter of this")])
def test_form_that_cannot_be_made_is_refused_with_the_reason(
    form: str, says: str, taught_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("ft_assets.release.export_gguf.importlib.util.find_spec", lambda name: None)
    facts = {"name": "tiny", "license": None, "llama_cpp": None, "base": "tiny", "asked": ASKED}
    with pytest.raises(ReleaseError, match=says):
        make_form(form, taught_model, taught_model, None, tmp_path / "out", facts)


def entry(**changes: Any) -> dict[str, Any]:
    return {"form": "gguf-f16", "refused": None, "agreement": {"transformers": 1.0}, "carried_over": {"template": True}, **changes}


@pytest.mark.parametrize(
    ("change", "passed", "says"),
    [
        ({}, True, "gguf-f16 transformers 1.00"),
        ({"agreement": {"transformers": 1.0, "llama.cpp": 0.3}}, False, "gguf-f16 by llama.cpp: 0.30 of 16 greedy answers"),
        ({"carried_over": {"template": False}}, False, "template not carried over"),
        ({"refused": "no tool"}, False, "gguf-f16 refused: no tool"),
    ],
)
def test_check_of_the_forms(change: dict, passed: bool, says: str) -> None:
    found = verdict_on_forms({"asked": 16, "skipped": None, "forms": [entry(**change)]}, 0.5)
    assert found.passed is passed
    assert says in str(found.description)


def test_export_of_the_champion(copy: Path) -> None:
    edit(copy, release={"forms": ["gguf-f16", "nf4", "adapter", "awq"], "smoke_rows": 4})
    result = materialize(copy, "export")
    assert result.success, failure(result)
    document = read(copy, "export", "export.json")
    made = {one["form"]: one for one in document["forms"]}
    assert made["gguf-f16"]["agreement"]["transformers"] == 1.0
    assert made["adapter"]["agreement"] == {"peft": 1.0}
    assert made["adapter"]["serve"][0].startswith("vllm serve ")
    assert 0.0 <= made["nf4"]["agreement"]["transformers"] <= 1.0
    assert "llmcompressor" in made["awq"]["refused"]
    assert (artifact(copy, "export") / "gguf-f16/Modelfile").is_file()
    assert "awq refused" in str(checks(result)["forms_answer_alike"].description)
    shutil.rmtree(copy / ".ft/store/release")
    assert "nothing is released" in failure(materialize(copy, "export"))
