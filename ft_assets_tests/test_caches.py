"""Answers and losses of batches equal those of one row at a time, with every kind of cache.

The models are random, of the real classes, in fp32. Each sequence is longer than the window.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ft_assets.inference import decoding, fast, generation
from ft_assets.inference.fast import EAGER
from ft_assets.inference.fused_norms import FusedNorms
from ft_assets.inference.fused_rotary import _of_whole_heads
from ft_assets.inference.generation import ALONE, RECURRENT, SLIDING, generate
from ft_assets.inference.losses import answer_losses
from ft_assets.inference.padding import batch_is_exact
from ft_assets.inference.prefix import ANY_LENGTH
from ft_assets.inference.sampling import Sampling
from ft_assets.inference.slots import SlotLayer
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


@pytest.fixture
def in_slots(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Return a function that turns decoding in slots on or off; on a CPU it has no graphs."""
    monkeypatch.setattr(decoding, "WORTH", 1)
    monkeypatch.setattr(decoding, "CHECK", 3)
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 50)
    monkeypatch.setattr(fast, "MIN_STEPS", 1)

    def turn(on: bool) -> None:
        for module in (fast, generation):
            monkeypatch.setattr(module, "decodes_fast", lambda _: on)

    return turn


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
def test_batched_answers_and_losses_equal_those_of_one_row_at_a_time(
    name: str, in_slots: Callable[[bool], None]
) -> None:
    model, prompts, told = family_model(name), random_prompts(40), []
    one_by_one = list(one_at_a_time(model, prompts))
    together = generate(model, Tokens(), prompts, STOPS, NEW, 6, told=told.append)
    assert [answer.ids for answer in together] == one_by_one
    assert told == TOLD[name]
    in_slots(True)
    told.clear()
    together = generate(model, Tokens(), prompts, STOPS, NEW, 5, told=told.append)
    assert [answer.ids for answer in together] == one_by_one
    state = [f"{EAGER}: its layers keep a state, not only keys and values"]
    assert told == TOLD[name] + (state if RECURRENT in TOLD[name] else [])
    rows: list[Any] = [
        {"input_ids": ids, "supervised": [False] * (len(ids) - 2) + [True] * 2} for ids in prompts
    ]
    alone = [answer_losses(model, [row], 1, PAD)[0][0] for row in rows]
    assert answer_losses(model, rows, 6, PAD)[0] == pytest.approx(alone, abs=1e-5)


def test_every_adapter_acts_in_slots_and_samples_alike(
    in_slots: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs, measured = [], fast.measured

    def proven(asked: Any, *rest: Any) -> Any:
        proofs.append(asked)
        return measured(asked, *rest)

    monkeypatch.setattr(fast, "measured", proven)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(family_model("llama"), config)
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    prompts, told = random_prompts(17), list[str]()
    sampling = Sampling(1.0, 0.9, 0, [str(row) for row in range(len(prompts))])

    def answers(how: Sampling | None) -> tuple[tuple[int, ...], ...]:
        given = generate(model, Tokens(), prompts, STOPS, NEW, 4, told=told.append, sampling=how)
        return tuple(answer.ids for answer in given)

    found: dict[bool, list[Any]] = {}
    for slots in (True, False):
        in_slots(slots)
        found[slots] = []
        for how in (None, sampling):
            for name in ("default", "dora"):
                model.set_adapter(name)
                found[slots].append(answers(how))
            with model.disable_adapter():
                found[slots].append(answers(how))
    assert found[True] == found[False]
    assert told == []
    assert len(proofs) == 3, "the base and each adapter are proven, once"
    assert len({*found[True]}) >= 4, "adapters and sampling act"  # a new DoRA is the base
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_model_that_slots_would_change_is_left_to_transformers(
    in_slots: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = family_model("llama"), random_prompts(0)

    def answers(slots: bool) -> tuple[list[Any], str]:
        told: list[str] = []
        in_slots(slots)
        given = generate(model, Tokens(), prompts, STOPS, NEW, 6, told=told.append)
        return [answer.ids for answer in given], "; ".join(told)

    right, _ = answers(False)
    with monkeypatch.context() as patch:
        patch.setattr(SlotLayer, "get_seq_length", lambda self: self.place[0] * 0)
        found, told = answers(True)
        assert found == right
        assert re.match(f"{EAGER}: logits would differ by [0-9.e+]+ standard deviations", told)
    for known in (False, True):  # a failure in the proof, and one that the proof has not met
        with monkeypatch.context() as patch:
            patch.setattr(decoding.Decoder, "_decode", lambda *_: 1 / 0)
            found, told = answers(True)
            assert found == right
            assert "ZeroDivisionError" in told and ("cannot be captured" in told) != known
        assert answers(True) == (right, "")
    model.generation_config.no_repeat_ngram_size = 2
    right, _ = answers(False)
    found, told = answers(True)
    assert found == right and told.endswith("generation_config.json sets no_repeat_ngram_size")


@pytest.mark.parametrize(("angles", "chosen"), [(8, "fused"), (4, "own")])
def test_rotation_of_a_part_of_each_head_stays_the_models(angles: int, chosen: str) -> None:
    def rotation(name: str) -> Callable[..., tuple[str, int]]:
        return lambda q, k, cos, sin, unsqueeze_dim=1: (name, unsqueeze_dim)

    heads, cos = torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, angles)
    rotate = _of_whole_heads(rotation("own"), rotation("fused"))
    assert rotate(heads, heads, cos, cos, unsqueeze_dim=2) == (chosen, 2)


@pytest.mark.parametrize(("name", "fused"), [("llama", 9), ("gemma3_text", 0), ("qwen3", 17)])
def test_only_norms_that_torch_computes_alike_are_replaced(name: str, fused: int) -> None:
    model = family_model(name)
    for module in model.modules():  # new norms multiply by 1, and so would hide a difference
        if type(module).__name__.endswith("RMSNorm"):
            torch.nn.init.normal_(module.weight)
    assert len(FusedNorms(model).norms) == fused


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
