"""Rendering and generation against slow and plain references, where a mistake would be silent."""

import dataclasses
from pathlib import Path

import pytest
from pydantic import ValidationError
from torch.nn import Linear, Module

from ft_assets.chat.rendering import ProofFailed
from ft_assets.config import LoraSettings
from ft_assets.config.training import ALL_LINEAR, TARGETS
from ft_assets.models.targets import linears_of, target_names
from ft_assets_tests.factories import CHATML, prompt_ids, supervised, tiny_tokenizer

MESSAGES = [
    {"role": "system", "content": "what is the colour"},
    {"role": "user", "content": "red apple"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "green river"},
    {"role": "assistant", "content": "no no"},
]


def test_all_answers_and_their_ends_are_supervised_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    rendered = supervised(tokenizer, MESSAGES, frozenset([tokenizer.eos_token_id]))
    kept = [
        token for token, flag in zip(rendered.input_ids, rendered.supervised, strict=True) if flag
    ]
    assert tokenizer.decode(kept) == "yes<|im_end|>no no<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>user\n'"),
            "differs from that given at generation",
        ),
        (CHATML.replace("'<|im_end|>' + '\n'", "'\n'"), "is not a token at which generation stops"),
        (CHATML.replace("message['content']", "(message['content'] | upper)"), "decode to 'YES'"),
        (
            CHATML.replace(
                "message['content']",
                "(message['content'] if loop.last or message['role'] != 'assistant' else '')",
            ),
            "drops this turn",
        ),
    ],
)
def test_a_template_that_would_train_something_else_is_refused(template: str, reason: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ProofFailed, match=reason):
        supervised(tokenizer, MESSAGES, frozenset([tokenizer.eos_token_id]))


def test_doubled_bos_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + CHATML
    with pytest.raises(ProofFailed, match="BOS occurs 2 times"):
        supervised(tokenizer, MESSAGES, frozenset([tokenizer.eos_token_id]))


def test_batched_answers_with_a_shared_prefix_equal_answers_one_by_one(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ft_assets.inference.generation import generate

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    system = {"role": "system", "content": "what is the colour of the apple stone river cloud"}
    texts = ["red", "green river train", "blue window chair garden music winter", "lamp"]
    prompts = [prompt_ids(tokenizer, [system, {"role": "user", "content": text}]) for text in texts]
    stops = frozenset([tokenizer.eos_token_id])
    together = generate(model, tokenizer, prompts, stops, 12, 3)
    alone = [generate(model, tokenizer, [prompt], stops, 12, 1)[0] for prompt in prompts]
    assert [dataclasses.astuple(answer) for answer in together] == [
        dataclasses.astuple(answer) for answer in alone
    ]
    assert len({answer.text for answer in together}) > 1  # else the prompts would not matter


def test_a_misspelt_preset_of_target_modules_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValidationError, match="'atention' is not a known preset; did you mean"):
        LoraSettings.model_validate({"target_modules": "atention"})


def test_every_preset_of_target_modules_names_modules_for_peft() -> None:
    model = Module()
    for name in {module for modules in TARGETS.values() for module in modules}:
        model.add_module(name, Linear(2, 2))
    for preset, modules in TARGETS.items():
        expected = preset if preset == ALL_LINEAR else list(modules)
        assert target_names(linears_of(model), preset) == expected
