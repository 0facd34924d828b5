"""Rendering, generation, merge: the parts that a quiet mistake would hide in, against slow and plain references."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ft_assets.chat.rendering import ProofFailed, render, render_supervised
from ft_assets_tests.conftest import CHATML, tiny_tokenizer

MESSAGES = [
    {"role": "system", "content": "what is the colour"},
    {"role": "user", "content": "red apple"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "green river"},
    {"role": "assistant", "content": "no no"},
]


def test_all_answers_and_their_ends_are_supervised_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    rendered = render_supervised(tokenizer, MESSAGES, frozenset([tokenizer.eos_token_id]))
    kept = [token for token, flag in zip(rendered.input_ids, rendered.supervised, strict=True) if flag]
    assert tokenizer.decode(kept) == "yes<|im_end|>no no<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>user\n'"), "differs from that given at generation"),
        (CHATML.replace("'<|im_end|>' + '\n'", "'\n'"), "no token at which generation stops"),
        (CHATML.replace("message['content']", "(message['content'] | upper)"), "decode to 'YES'"),
        (
            CHATML.replace("message['content']", "(message['content'] if loop.last or message['role'] != 'assistant' else '')"),
            "drops this turn",
        ),
    ],
)
def test_a_template_that_would_train_something_else_is_refused(template: str, reason: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ProofFailed, match=reason):
        render_supervised(tokenizer, MESSAGES, frozenset([tokenizer.eos_token_id]))


def test_doubled_bos_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + CHATML
    with pytest.raises(ProofFailed, match="BOS stands 2 times"):
        render_supervised(tokenizer, MESSAGES, frozenset([tokenizer.eos_token_id]))


def test_batched_answers_with_a_shared_prefix_equal_answers_one_by_one(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ft_assets.evaluation.generation import generate

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    system = {"role": "system", "content": "what is the colour of the apple stone river cloud"}
    texts = ["red", "green river train", "blue window chair garden music winter", "lamp"]
    prompts = [render(tokenizer, [system, {"role": "user", "content": text}], generation_prompt=True) for text in texts]
    stops = frozenset([tokenizer.eos_token_id])
    together = generate(model, tokenizer, prompts, stops, 12, 3)
    alone = [generate(model, tokenizer, [prompt], stops, 12, 1)[0] for prompt in prompts]
    assert [dataclasses.astuple(answer) for answer in together] == [dataclasses.astuple(answer) for answer in alone]
    assert len({answer.text for answer in together}) > 1  # else the prompts would not matter


def adapter_of(tiny_model: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter whose B is random, so that merging it changes every target."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = get_peft_model(
        base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_merged_weights_equal_those_of_peft(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ft_assets.release.merge import merge

    snapshot = tmp_path / "snapshot"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(snapshot)
    adapter = adapter_of(snapshot, tmp_path / "adapter", **settings)
    output = tmp_path / "merged"
    output.mkdir()
    assert merge(snapshot, adapter, output)["merged_modules"] == 14  # 7 linear layers in each of 2 blocks
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    exact = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    changed = 0
    for name, tensor in exact.items():
        assert torch.allclose(merged[name], tensor, rtol=2**-7, atol=1e-4), name  # one rounding to bf16's 8 bits
        changed += bool((tensor != before[name]).any())
    assert changed == 14


def test_merge_into_another_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from ft_assets.errors import ModelError
    from ft_assets.release.merge import merge

    adapter = adapter_of(tiny_model, tmp_path / "adapter")
    config = json.loads((tiny_model / "config.json").read_text()) | {"num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path / "other")
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match="7 modules have no weight in the base"):
        merge(tmp_path / "other", adapter, tmp_path / "merged")
