"""Answers and losses of batches equal those of one row at a time, with every kind of cache.

The models are random, of the real classes, in fp32. Each sequence is longer than the window.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ft_assets.inference import generation
from ft_assets.inference.generation import ALONE, RECURRENT, SLIDING, generate
from ft_assets.inference.losses import answer_losses
from ft_assets.inference.padding import batch_is_exact
from ft_assets.inference.prefix import ANY_LENGTH
from ft_assets_tests.families import VOCABULARY, WINDOW, family_model

NEW, PAD, STOPS = 12, 3, frozenset({2})
WINDOWS = (
    "mistral",
    "qwen2",
    "gemma3_text",
    "gemma4_text",
    "phi3",
    "olmo3",
    "gpt_oss",
    "llama4_text",
)
STATES = ("qwen3_5_text", "granitemoehybrid", "lfm2", "falcon_h1", "mamba2")
TOLD = {
    "qwen3_moe": [],
    **{name: [SLIDING] for name in WINDOWS},
    **{name: [RECURRENT] for name in STATES},
    "rwkv": [RECURRENT, ALONE],
}


class Tokens:
    """The part of a tokenizer that `generate` uses."""

    pad_token_id = PAD

    @staticmethod
    def decode(ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def random_prompts(prefix: int) -> list[list[int]]:
    chance = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(4, VOCABULARY, (count,), generator=chance).tolist()

    shared = tokens(prefix)
    return [shared + tokens(count) for count in (3, 5, 9, 9, 31, 60)]


def one_at_a_time(model: Any, prompts: list[list[int]]) -> Iterator[tuple[int, ...]]:
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=[2],
            pad_token_id=PAD,
        )
        yield tuple(made[0, len(prompt) :].tolist())


@pytest.mark.parametrize("name", TOLD)
def test_batched_answers_and_losses_equal_those_of_one_row_at_a_time(name: str) -> None:
    model, prompts, told = family_model(name), random_prompts(40), []
    together = generate(model, Tokens(), prompts, STOPS, NEW, 6, told=told.append)
    assert [answer.ids for answer in together] == list(one_at_a_time(model, prompts))
    assert told == TOLD[name]
    rows: list[Any] = [
        {"input_ids": ids, "supervised": [False] * (len(ids) - 2) + [True] * 2} for ids in prompts
    ]
    alone = [answer_losses(model, [row], 1, PAD)[0][0] for row in rows]
    assert answer_losses(model, rows, 6, PAD)[0] == pytest.approx(alone, abs=1e-5)


def test_prefix_is_shared_where_every_row_ends_inside_the_window() -> None:
    model, told = family_model("mistral"), []
    short = [prompt[:20] + prompt[-2:] for prompt in random_prompts(20)]
    short = [[*prompt[: 16 + index % 3], 7 + index] for index, prompt in enumerate(short)]
    assert max(map(len, short)) + 4 <= WINDOW
    together = generate(model, Tokens(), short, STOPS, 4, 6, told=told.append)
    assert told == []
    alone = [generate(model, Tokens(), [prompt], STOPS, 4)[0].ids for prompt in short]
    assert [answer.ids for answer in together] == alone


@pytest.mark.parametrize("name", [name for name in WINDOWS if name != "gpt_oss"])
def test_prefix_beyond_the_window_would_change_answers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = family_model(name), random_prompts(40)
    monkeypatch.setattr(generation, "longest_padded", lambda _: ANY_LENGTH)
    together = generate(model, Tokens(), prompts, STOPS, NEW, 6)
    alone = list(one_at_a_time(model, prompts))
    assert sum(answer.ids == one for answer, one in zip(together, alone, strict=True)) < 6


@pytest.mark.parametrize(("name", "exact"), [("mamba2", True), ("lfm2", True), ("rwkv", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_measured(name: str, exact: bool, dtype: torch.dtype) -> None:
    short, *_, long = random_prompts(2)
    assert batch_is_exact(family_model(name).to(dtype), short, long, PAD) is exact


def test_attention_dropout_is_off_where_a_proof_needs_it() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ft_assets.training.dropout import without_dropout
    from ft_assets_tests.families import SIZES

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attention_dropout=0.5)).train()
    ids = torch.tensor([random_prompts(2)[-1]])

    def twice() -> tuple[Any, Any]:
        with torch.no_grad():
            return model(input_ids=ids).logits, model(input_ids=ids).logits

    with without_dropout(model):
        assert torch.equal(*twice())
    assert not torch.equal(*twice())
