"""Serving formats: other readers get the merged model's answers, or the format is refused."""

import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from ft_assets.assets.export import least_agreement, verdict_on_formats
from ft_assets.config import ReleaseSettings
from ft_assets.errors import ArtifactError, ReleaseError
from ft_assets.export import readers
from ft_assets.export.export_report import Agreement, ExportedFormat, ExportReport
from ft_assets.export.formats import ServingFacts, Source, WrittenFormat, make_format
from ft_assets.export.gguf import Rope, interleaved, llama3_factors, why_not, write_gguf
from ft_assets.export.gguf_tokenizer import TokenizerJson, pre_tokenizer_name
from ft_assets.export.ollama import Pieces, modelfile, pieces_of
from ft_assets.export.readers import Expected, Found
from ft_assets.export.tools import identities
from ft_assets.models.loading import load_base, load_tokenizer
from ft_assets.orchestration.materializer import ERROR, WARN
from ft_assets_tests.factories import CHATML, edit
from ft_assets_tests.pipeline import artifact, checks, failure, general, materialize, read

ROLES = ("system", "user", "assistant")
LEAST = least_agreement("gguf-f16", ReleaseSettings().min_form_agreement)
ASKED = [row["messages"][:-1] for row in general(8)]


@pytest.fixture(scope="module")
def gguf(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    files = {kind: folder / f"tiny-{kind}.gguf" for kind in ("f16", "q8_0")}
    for kind, file in files.items():
        write_gguf(taught_model, file, kind, "tiny", "apache-2.0")
    return files


@pytest.mark.slow
def test_weights_read_back_by_the_gguf_package_are_the_models(
    gguf: dict[str, Path], taught_model: Path
) -> None:
    weights = load_file(taught_model / "model.safetensors")
    found = {tensor.name: tensor for tensor in GGUFReader(gguf["f16"]).tensors}
    assert len(found) == len(weights)
    query = found["blk.1.attn_q.weight"].data.reshape(64, 64)
    np.testing.assert_array_equal(
        query, interleaved(weights["model.layers.1.self_attn.q_proj.weight"], 4).half().numpy()
    )
    np.testing.assert_array_equal(
        found["blk.0.attn_norm.weight"].data,
        weights["model.layers.0.input_layernorm.weight"].float().numpy(),
    )
    np.testing.assert_array_equal(
        found["token_embd.weight"].data.reshape(-1, 64),
        weights["model.embed_tokens.weight"].half().numpy(),
    )


def test_template_stop_tokens_and_vocabulary_are_carried_over(
    gguf: dict[str, Path], taught_model: Path, tmp_path: Path
) -> None:
    assert all(readers.carried_over(gguf["q8_0"], taught_model).values())
    other = shutil.copytree(taught_model, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 0]}))
    lost = readers.carried_over(gguf["q8_0"], other)
    assert (lost["template"], lost["stop_tokens"], lost["tokens"]) == (False, False, True)


@pytest.fixture(scope="module")
def expected(taught_model: Path) -> list[Expected]:
    return readers.by_merged(taught_model, ASKED, 8)[0]


def top1(expected: list[Expected], file: Path) -> float:
    return readers.agreement(expected, readers.by_transformers_gguf(file, ASKED, expected, 8)).top1


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_good_gguf_has_the_models_tokens_by_transformers_own_loader(
    gguf: dict[str, Path], expected: list[Expected], kind: str
) -> None:
    assert (
        len({one.answer for one in expected}) > 3
    )  # it has been taught: answers differ from prompt to prompt
    assert all(one.ids[-1] == 2 for one in expected)  # the end of turn is asked for too
    assert top1(expected, gguf[kind]) >= 0.95


def doubled(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return interleaved(2 * tensor, heads)


@pytest.mark.parametrize(
    "broken",
    [lambda tensor, heads: tensor, doubled],
    ids=["rows of q and k in another order", "q and k doubled"],
)
def test_broken_weights_are_noticed(
    broken: Any,
    expected: list[Expected],
    taught_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ft_assets.export.gguf.interleaved", broken)
    write_gguf(taught_model, tmp_path / "bad.gguf", "f16", "tiny", None)
    assert top1(expected, tmp_path / "bad.gguf") < LEAST


def test_near_tie_counts_as_equal_and_another_token_does_not(expected: list[Expected]) -> None:
    logits = torch.tensor([10.0, 9.95, 9.0])
    assert readers._accepted(logits) == {0, 1}
    right = [list(one.ids) for one in expected]
    answers = [one.answer for one in expected]
    assert readers.agreement(expected, Found(answers, right)) == Agreement(top1=1.0, greedy=1.0)
    found = readers.agreement(
        expected, Found(["", *answers[1:]], [[399] * len(right[0]), *right[1:]])
    )
    assert found.top1 == 1 - len(right[0]) / sum(map(len, right))
    assert found.greedy == 1 - 1 / len(answers)


class LlamaCpp:
    """Replaces llama-cpp-python's Llama: records its options, answers by the transformers model."""

    loaded: ClassVar[dict[str, Any]] = {}

    def __init__(self, path: str, **settings: Any) -> None:
        self.loaded.update(settings, closed=False)
        self.folder: Path = self.loaded["folder"]
        self.model, self.tokenizer = load_base(self.folder), load_tokenizer(self.folder)

    def create_chat_completion(self, messages: Any, temperature: float, max_tokens: int) -> Any:
        return {"choices": [{"message": {"content": "?"}}]}

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        return self.tokenizer(text.decode(), add_special_tokens=add_bos)["input_ids"]

    def reset(self) -> None:
        """Forget what was read."""

    def eval(self, tokens: list[int]) -> None:
        assert len(tokens) <= self.loaded["n_ctx"]
        with torch.inference_mode():
            self.scores = self.model(torch.tensor([tokens])).logits[0].float().numpy()

    def close(self) -> None:
        self.loaded["closed"] = True


def test_llama_cpp_gets_no_longer_a_context_than_the_prompts_need(
    expected: list[Expected], taught_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binding: Any = types.ModuleType("llama_cpp")
    binding.Llama, binding.__spec__ = LlamaCpp, importlib.machinery.ModuleSpec("llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", binding)
    LlamaCpp.loaded["folder"] = taught_model
    found = readers.by_llama_cpp(taught_model / "x.gguf", ASKED, expected, 8)
    assert found is not None
    assert readers.agreement(expected, found) == Agreement(top1=1.0, greedy=0.0)
    assert 0 < LlamaCpp.loaded["n_ctx"] < 200  # 0 would be all that the model was made for
    assert LlamaCpp.loaded["closed"] is True


def test_llama_3_frequencies_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=rope
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    ours = llama3_factors(Rope.model_validate(rope), 128)
    np.testing.assert_allclose(plain.numpy() / ours, scaled.numpy(), rtol=1e-5)
    assert ours.max() == 8.0
    assert ours.min() == 1.0


def test_other_architectures_are_refused_by_name(taught_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(taught_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "architectures": ["Gemma3ForCausalLM"]})
    )
    assert "Gemma3ForCausalLM is not one of" in str(why_not(other))
    with pytest.raises(ReleaseError, match=r"release\.llama_cpp"):
        write_gguf(other, tmp_path / "x.gguf", "f16", "x", None)


def test_unknown_pre_tokenizer_is_refused_not_guessed() -> None:
    model = {
        "model": {"type": "BPE"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+"}},
    }
    with pytest.raises(ReleaseError, match="pre-tokenizer is not one"):
        pre_tokenizer_name(TokenizerJson.model_validate(model), "here")
    with pytest.raises(ReleaseError, match="byte fallback"):
        model = {"model": {"type": "BPE", "byte_fallback": True}}
        pre_tokenizer_name(TokenizerJson.model_validate(model), "here")


def test_modelfile_writes_the_template_for_go_and_stops_where_the_model_does(
    gguf: dict[str, Path], taught_model: Path
) -> None:
    text, why_not = modelfile("tiny.gguf", taught_model, ASKED, readers.adds_bos(gguf["f16"]))
    assert why_not is None
    assert text.startswith("FROM ./tiny.gguf\n")
    assert f'PARAMETER stop "{load_tokenizer(taught_model).eos_token}"' in text
    around = [
        f'"{role}" }}}}{{{{ "<|im_start|>{role}\\n" }}}}{{{{ .Content }}}}{{{{ "<|im_end|>\\n" }}}}'
        for role in ROLES
    ]
    branches = "{{ if eq .Role " + "{{ else if eq .Role ".join(around)
    turns = f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"
    assert f'TEMPLATE """{turns}{{{{ "<|im_start|>assistant\\n" }}}}"""\n' in text


def written(name: str, source: Source, output: Path) -> WrittenFormat:
    return make_format(name, source, output, ServingFacts(name="tiny", base="tiny"), ASKED)


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
        (
            "{% if messages|length > 6 %}long{% endif %}" + CHATML,
            [[*ASKED[0], {"role": "assistant", "content": "x"}] * 4],
            False,
        ),
        (CHATML, [[*ASKED[0], *ASKED[1]]], False),  # Ollama joins two turns of one role
        (CHATML.replace("message['content']", "message['content']|upper"), ASKED, False),
        (
            "{% for m in messages %}[{{ loop.index }}]{{ m.role + m.content }}{% endfor %}",
            ASKED,
            False,
        ),
    ],
)
def test_template_is_written_for_ollama_only_where_it_is_proven_equal(
    template: str, asked: Any, provable: bool
) -> None:
    found = pieces_of(write_of(template), asked)
    assert isinstance(found, Pieces) is provable
    if isinstance(found, Pieces):
        turns = [{"role": role, "content": "{{ ä }}\n"} for role in (*ROLES, "user")]
        for messages in (turns, turns[1:], *asked):
            assert found.render(messages) == write_of(template)(messages, True)


def test_modelfile_of_another_template_says_that_ollama_does_not_use_it(
    taught_model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(taught_model, tmp_path / "other")
    (other / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ loop.index }}]{{ m.role + m.content }}{% endfor %}"
    )
    made = written("gguf-f16", Source(other, other), tmp_path / "out")
    text = (tmp_path / "out/Modelfile").read_text()
    assert "\nTEMPLATE" not in text
    assert "# No TEMPLATE: the model's chat template is not constant text" in text
    assert "llama-server -m tiny-F16.gguf --jinja" in text
    assert made.serve == ["llama-server -m tiny-F16.gguf --jinja"]
    assert "not for Ollama" in made.notes[0]


def test_bos_is_written_by_the_template_or_by_the_file_but_not_twice(
    taught_model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(taught_model, tmp_path / "other")
    tokenizer = load_tokenizer(other)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.save_pretrained(other)
    assert '{{ "<|endoftext|>" }}' in modelfile("x.gguf", other, ASKED, adds_bos=False)[0]
    assert "<|endoftext|>" not in modelfile("x.gguf", other, ASKED, adds_bos=True)[0]
    assert "does not have the key for BOS" in str(
        modelfile("x.gguf", other, ASKED, adds_bos=None)[1]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(other)
    assert "the template does not" in str(modelfile("x.gguf", other, ASKED, adds_bos=True)[1])


@pytest.mark.parametrize(
    ("form", "says"),
    [("awq", "llmcompressor"), ("gguf-q4_k_m", "llama-quantize"), ("adapter", "adapter of this")],
)
def test_form_that_cannot_be_made_is_refused_with_the_reason(
    form: str, says: str, taught_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("ft_assets.export.gguf.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ReleaseError, match=says):
        written(form, Source(taught_model, taught_model), tmp_path / "out")


def test_tools_that_a_form_uses_are_part_of_what_is_asked_and_places_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    without = identities(["gguf-q4_k_m"], None)
    assert without["llama-quantize"] is None
    for name in ("one", "other"):
        (tmp_path / name / "build/bin").mkdir(parents=True)
        (tmp_path / name / "convert_hf_to_gguf.py").write_text("1")
        (tmp_path / name / "build/bin/llama-quantize").write_text("1")
    one = identities(["gguf-q4_k_m"], tmp_path / "one")
    assert one == identities(["gguf-q4_k_m"], tmp_path / "other")
    assert one["llama-quantize"] is not None
    assert one["converter"] is not None
    (tmp_path / "other/build/bin/llama-quantize").write_text("2")
    assert one != identities(["gguf-q4_k_m"], tmp_path / "other")
    assert identities(["gguf-q8_0"], None) != identities(
        ["gguf-q8_0"], tmp_path / "empty"
    )  # refused there, not written here
    assert set(identities(["adapter", "nf4"], tmp_path / "one")) == {"bitsandbytes"}


def test_form_refused_for_want_of_a_tool_is_made_when_it_is_there(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    edit(copy, release={"forms": ["gguf-q4_k_m"], "smoke_rows": 2})
    assert "llama-quantize" in str(
        checks(materialize(copy, "export"))["forms_answer_alike"].description
    )
    llama_cpp = tmp_path / "llama.cpp"
    llama_cpp.mkdir()
    (llama_cpp / "llama-quantize").write_text("#!/bin/sh\nexit 3\n")
    (llama_cpp / "llama-quantize").chmod(0o755)
    (llama_cpp / "convert_hf_to_gguf.py").write_text("import sys; sys.exit('no such architecture')")
    edit(copy, release={"llama_cpp": str(llama_cpp)})
    assert "no such architecture" in str(
        checks(materialize(copy, "export"))["forms_answer_alike"].description
    )


def plain_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """Write a LoRA adapter of the tiny model."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], **changes}
    get_peft_model(load_base(base), LoraConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "rank", "says"),
    [
        ({}, 8, None),
        ({"r": 12, "rank_pattern": {"layers.0.self_attn.q_proj": 20}}, 32, None),
        ({"use_dora": True}, 0, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, 0, "lora.modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, 0, "lora.trainable_token_indices"),
    ],
)
def test_adapter_is_made_only_where_vllm_loads_it(
    changes: Any, rank: int, says: str | None, taught_model: Path, tmp_path: Path
) -> None:
    adapter, commit = plain_adapter(taught_model, tmp_path / "adapter", **changes), "c0ffee" * 6
    source = Source(taught_model, taught_model, adapter)
    facts = ServingFacts(name="tiny", base="me/tiny", revision=commit)
    if says:
        with pytest.raises(ReleaseError, match=says):
            make_format("adapter", source, tmp_path / "out", facts, ASKED)
        return
    (line,) = make_format("adapter", source, tmp_path / "out", facts, ASKED).serve
    assert f"vllm serve me/tiny --revision {commit} --enable-lora --max-lora-rank {rank} " in line
    assert line.endswith("--chat-template ./adapter/chat_template.jinja")
    assert (tmp_path / "out/chat_template.jinja").read_text() == CHATML
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", commit)


def entry(**changes: Any) -> ExportedFormat:
    agreement = {"transformers": {"top1": 1.0, "greedy": 0.25}}
    good = {
        "form": "gguf-f16",
        "refused": None,
        "agreement": agreement,
        "failed": {},
        "carried_over": {"template": True},
    }
    return ExportedFormat.model_validate({**good, **changes})


LOW = {"transformers": {"top1": 1.0, "greedy": 1.0}, "llama.cpp": {"top1": 0.3, "greedy": 0.1}}


@pytest.mark.parametrize(
    ("change", "severity", "says"),
    [
        (
            {},
            None,
            "gguf-f16 by transformers: top-1 1.000, greedy answers equal 0.25",
        ),  # a low share of these is no fault
        (
            {"form": "nf4", "agreement": {"transformers": {"top1": 0.726, "greedy": 0.0}}},
            None,
            "nf4 by transformers: top-1 0.726",
        ),
        ({"agreement": LOW}, ERROR, "gguf-f16 by llama.cpp: 0.300 of 99 tokens"),
        ({"carried_over": {"template": False}}, ERROR, "template not carried over"),
        ({"refused": "no tool"}, WARN, "gguf-f16 refused: no tool"),
        (
            {"failed": {"llama.cpp": "out of memory"}},
            WARN,
            "gguf-f16 not read by llama.cpp: out of memory; gguf-f16 by transformers",
        ),
        (
            {"failed": {"llama.cpp": "out of memory"}, "agreement": {}},
            ERROR,
            "gguf-f16: no reader could read it; gguf-f16 not read by",
        ),
    ],
)
def test_check_of_the_forms(change: dict, severity: Any, says: str) -> None:
    report = ExportReport(
        prompts=1, tokens=99, logits_dtype="float32", formats=[entry(**change)], skipped=None
    )
    found = verdict_on_formats(report, None)
    assert found.passed is (severity is None)
    assert severity is None or found.severity == severity
    assert says in str(found.description)


OLD = """{"asked": 16, "tokens": 436, "logits_in": "float32", "forms": [{"form": "gguf-q8_0",
"refused": null, "agreement": {"transformers": {"top1": 1.0, "greedy": 1.0}}, "failed": {},
"carried_over": {"template": true}, "tensors": 272, "bytes": 144810816, "writer": "gguf",
"notes": [], "file": "x-Q8_0.gguf", "serve": ["llama-server -m x-Q8_0.gguf --jinja"]},
{"form": "awq", "refused": "no library writes it"}], "skipped": null}"""


def test_document_keeps_its_layout_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(OLD)
    report = ExportReport.read(tmp_path)
    report.write(tmp_path)
    text = (tmp_path / "export.json").read_text()
    assert text == json.dumps(json.loads(OLD), indent=1)  # the same keys in the same order
    page = (tmp_path / "README.md").read_text()
    assert "| gguf-q8_0 | 0.145 GB | transformers 1.000 | transformers 1.000 | template |" in page
    assert "| awq | – | refused | – | – | no library writes it |" in page
    (tmp_path / "export.json").write_text(text.replace('"tokens"', '"token"'))
    with pytest.raises(ArtifactError, match=r"export.json: is damaged .*\(tokens: Field required"):
        ExportReport.read(tmp_path)


def test_form_whose_reader_fails_does_not_take_the_others_with_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17 GiB")

    monkeypatch.setattr("ft_assets.export.readers.by_transformers_gguf", out_of_memory)
    edit(copy, release={"forms": ["gguf-f16", "adapter"], "smoke_rows": 2})
    result = materialize(copy, "export")
    made = {one["form"]: one for one in read(copy, "export", "export.json")["forms"]}
    assert made["gguf-f16"]["failed"] == {
        "transformers": "OutOfMemoryError: CUDA out of memory. Tried to allocate 17 GiB"
    }
    assert made["adapter"]["agreement"]["peft"]["top1"] == 1.0
    assert "gguf-f16: no reader could read it" in str(
        checks(result)["forms_answer_alike"].description
    )
    assert "17 GiB" in (artifact(copy, "export") / "README.md").read_text()


def test_export_of_the_champion(copy: Path) -> None:
    edit(copy, release={"forms": ["gguf-f16", "nf4", "adapter", "awq"], "smoke_rows": 4})
    result = materialize(copy, "export")
    assert result.success, failure(result)
    document = read(copy, "export", "export.json")
    made = {one["form"]: one for one in document["forms"]}
    assert made["gguf-f16"]["agreement"]["transformers"] == {"top1": 1.0, "greedy": 1.0}
    assert made["adapter"]["agreement"] == {"peft": {"top1": 1.0, "greedy": 1.0}}
    assert made["adapter"]["serve"][0].startswith("vllm serve ")
    assert least_agreement("nf4", None) <= made["nf4"]["agreement"]["transformers"]["top1"] <= 1.0
    assert "llmcompressor" in made["awq"]["refused"]
    assert (artifact(copy, "export") / "gguf-f16/Modelfile").is_file()
    assert "awq refused" in str(checks(result)["forms_answer_alike"].description)
    shutil.rmtree(copy / ".ft/store/release")
    assert "nothing is released" in failure(materialize(copy, "export"))
