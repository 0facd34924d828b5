"""Compare decoding by CUDA graphs with transformers' own loop, on the kernels of this machine."""

import time
from typing import Any

import torch
from generation import SHAPE_8B, Pad, adapted, by_loop, prompts, random_model, shape_8b
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ft_assets.inference import decoding
from ft_assets.inference.fast import Asked, measured
from ft_assets.inference.generation import generate
from ft_assets.inference.prefix import Prefix, prefill
from ft_assets.inference.sampling import Sampling

SMALL: dict[str, Any] = {
    **SHAPE_8B,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}
ROWS, NEW = 48, 80


def check() -> None:
    """Print the share of equal answers in fp32, and the differences of an 8B model in bf16."""
    print("| model | answers equal | stopped | told |\n|---|---|---|---|")
    for name, kind, config in (
        ("llama", LlamaForCausalLM, LlamaConfig(**SMALL)),
        ("window of 160", MistralForCausalLM, MistralConfig(**SMALL, sliding_window=160)),
    ):
        model = adapted(random_model(kind, config, torch.float32))
        for way in ("greedy", "sampled"):
            _equal(f"{name}, {way}", model, sampled=way == "sampled")
    if torch.cuda.is_available():
        _bf16()


def _equal(name: str, model: Any, sampled: bool) -> None:
    asked, told = prompts(ROWS, SMALL["vocab_size"]), list[str]()
    chance = torch.Generator().manual_seed(1)
    stops = frozenset(torch.randperm(SMALL["vocab_size"], generator=chance)[:160].tolist())
    sampling = Sampling(1.0, 0.9, 0, [str(row) for row in range(ROWS)]) if sampled else None

    def ours() -> list[tuple[int, ...]]:
        found = generate(model, Pad(), asked, stops, NEW, 32, told=told.append, sampling=sampling)
        return [answer.ids for answer in found]

    fast, slow = ours(), by_loop(ours)
    same = sum(one == other for one, other in zip(fast, slow, strict=True))
    stopped = sum(len(ids) < NEW for ids in fast)
    print(f"| {name} | {same} of {ROWS} | {stopped} | {'; '.join(told)} |", flush=True)


def _bf16() -> None:
    """Compare the logits, and the share of equal answers beside that of another batch size."""
    model, rows, new = adapted(shape_8b()), 64, 64
    asked, stops = prompts(rows, model.config.vocab_size), frozenset([model.config.vocab_size - 1])
    few = [min(asked, key=len), max(asked, key=len)]
    with torch.inference_mode():
        one = prefill(model, few[0][:1])
        question = Asked(model, stops, 0, max(map(len, asked)) + new, new, None)
        print(f"logits: {measured(question, one, few, Prefix(0, None))}")

    def ours(batch: int) -> list[tuple[int, ...]]:
        found = generate(model, Pad(), asked, stops, new, batch, told=print)
        return [answer.ids for answer in found]

    slow = by_loop(lambda: ours(rows))
    for name, other in (
        ("graphs", ours(rows)),
        ("graphs again", ours(rows)),
        ("graphs, batches of 32", ours(32)),
        ("loop, batches of 32", by_loop(lambda: ours(32))),
    ):
        whole = sum(one == two for one, two in zip(slow, other, strict=True))
        print(
            f"bf16, {name} against the loop: {whole} of {rows} answers equal, "
            f"first difference at token {_agreed(slow, other):.1f} of {new} in the mean",
            flush=True,
        )


def _agreed(one: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> float:
    """Return the mean number of tokens before two answers differ."""
    agreed = [
        next(
            (place for place, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), len(pair[0])
        )
        for pair in zip(one, other, strict=True)
    ]
    return sum(agreed) / len(agreed)


def profile(rows: int = 256, new: int = 128) -> None:
    """Print the time of the prompts and of a step, the memory floor, and a step's kernels."""
    model = adapted(shape_8b())
    asked = sorted(prompts(rows, model.config.vocab_size), key=len)
    with torch.inference_mode():
        prefix = Prefix(100, prefill(model, asked[0][:100]))
        decoder = decoding.Decoder(
            model, prefix.cache, rows, len(asked[-1]) + new, new, frozenset(), 0
        )
        for _ in range(2):
            begun = _now()
            with decoder.kernels():
                decoder._begin(asked, prefix, None)
                print(f"prompts: {1e3 * (_now() - begun):.0f} ms")
                decoder._next(rows)
                begun = _now()
                for _ in range(64):
                    decoder._next(rows)
                step = (_now() - begun) / 64
        print(f"step: {1e3 * step:.2f} ms, {rows / step:.0f} tokens/s; {_floor(model, asked, new)}")
        with (
            decoder.kernels(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found,
        ):
            decoder._begin(asked, prefix, None)
        _kernels("prompts", found)
        with (
            decoder.kernels(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found,
        ):
            decoder._step(rows)
        _kernels("step", found)


def _kernels(what: str, found: Any) -> None:
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    print(
        f"{what}: {total / 1e3:.2f} ms of kernels, {sum(event.count for event in events)} kernels"
    )
    for event in events[:22]:
        print(f"  {event.self_device_time_total / 1e3:8.3f} ms {event.count:5d} {event.key[:110]}")


def _floor(model: Any, asked: list[list[int]], new: int) -> str:
    """Return the time to read the weights, and the keys and values of a middle step, once."""
    a, b = (torch.empty(2**32, dtype=torch.uint8, device="cuda") for _ in range(2))
    b.copy_(a)
    begun = _now()
    for _ in range(5):
        b.copy_(a)
    rate = 5 * 2 * a.numel() / (_now() - begun)
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * size * 2
    cached = slot * (sum(map(len, asked)) + len(asked) * new // 2)
    weights = sum(weight.nbytes for weight in model.parameters())
    floor = (weights + cached) / rate
    return (
        f"floor {1e3 * floor:.2f} ms ({weights / 1e9:.1f} GB of weights, {cached / 1e9:.1f} GB of "
        f"keys and values at {rate / 1e12:.2f} TB/s), {len(asked) / floor:.0f} tokens/s"
    )


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
