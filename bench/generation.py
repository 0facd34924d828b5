"""Measure the evaluation's generation against a naive loop and transformers' own engines.

    python bench/generation.py [8b | <folder of a snapshot>] [rows] [new tokens]
    python bench/generation.py --peers
    python bench/generation.py --check | --profile

All variants answer the same prompts greedily with an active LoRA adapter on all linears, in the
dtypes that evaluation loads. `8b` is the shape of an 8B Llama with random weights. The speed does
not depend on their values, and no answer stops early. Tokens/s count new tokens only. Without
--peers: this project alone, by CUDA graphs and by transformers' loop.
--check: decoding by CUDA graphs against transformers' own loop, see generation_checks.py.
--profile: the GPU time of a step by kernels, and the memory floor.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from ft_assets.inference import fast, generation
from ft_assets.inference.generation import generate
from ft_assets.models.loading import load_base

SHAPE_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def shape_8b() -> Any:
    return random_model(LlamaForCausalLM, LlamaConfig(**SHAPE_8B), torch.bfloat16)


def random_model(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a model with random weights, on the GPU if there is one."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = kind(config)
    torch.set_default_dtype(torch.float32)
    return model


def adapted(model: Any) -> Any:
    """Return the model with an acting adapter, in fp32 as PEFT loads it."""
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model.eval()


class Pad:
    """The part of a tokenizer that generation needs."""

    pad_token_id = 0

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def prompts(rows: int, vocabulary: int) -> list[list[int]]:
    """Return prompts of 100 shared tokens (a system turn) and 20 to 220 of their own."""
    chance = torch.Generator().manual_seed(0)
    shared = torch.randint(10, vocabulary, (100,), generator=chance).tolist()
    lengths = torch.randint(20, 221, (rows,), generator=chance).tolist()
    return [
        shared + torch.randint(10, vocabulary, (length,), generator=chance).tolist()
        for length in lengths
    ]


def timed(name: str, call: Callable[[], int], against: float | None) -> float:
    begun = time.perf_counter()
    try:
        tokens = call()
    except Exception as error:
        print(
            f"| {name} | – | – | {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:120]} |",
            flush=True,
        )
        return 0.0
    speed = tokens / (time.perf_counter() - begun)
    memory = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
    print(
        f"| {name} | {speed:.0f} | {speed / against:.2f} | {memory:.1f} |"
        if against
        else f"| {name} | {speed:.0f} | 1.00 | {memory:.1f} |",
        flush=True,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return speed


def main(which: str, rows: int, new: int, peers: bool) -> None:
    model = adapted(shape_8b() if which == "8b" else load_base(Path(which)))
    prompt_ids = prompts(rows, model.config.vocab_size)
    greedy: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": new,
        "min_new_tokens": new,
        "pad_token_id": 0,
        "eos_token_id": None,
    }

    def naive() -> int:
        few = prompt_ids[: max(2, min(8, rows // 8))]
        for prompt in few:
            ids = torch.tensor([prompt], device=model.device)
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy)
        return new * len(few)

    def ours(batch: int | None) -> int:
        some = {None: rows, 1: 2, 512: 512}.get(batch, 64)
        stops = frozenset([model.config.vocab_size - 1])
        generate(model, Pad(), (prompt_ids * 2)[:some], stops, new, batch, told=print)
        return new * some

    def stock(batch: int, **options: Any) -> int:
        for begin in range(0, rows, batch):
            chosen = prompt_ids[begin : begin + batch]
            width = max(map(len, chosen))
            ids = torch.tensor(
                [[0] * (width - len(prompt)) + prompt for prompt in chosen], device=model.device
            )
            mask = torch.tensor(
                [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in chosen],
                device=model.device,
            )
            model.generate(input_ids=ids, attention_mask=mask, **greedy, **options)
        return new * rows

    def continuous(**options: Any) -> int:
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=model.config.vocab_size - 1,
            pad_token_id=0,
        )
        found = model.generate_batch(
            inputs=prompt_ids,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(**options),
        )
        return sum(len(result.generated_tokens) for result in found.values())

    gpu = torch.cuda.is_available()
    most = rows if gpu else 32
    variants: list[tuple[str, Callable[[], int]]] = [
        ("this project", lambda: ours(None)),
        ("this project, by transformers' loop", lambda: by_loop(lambda: ours(None))),
        ("this project, again", lambda: ours(None)),
        *(
            (f"this project, batches of {size}", lambda size=size: ours(size))
            for size in SIZES[gpu]
        ),
    ]
    if peers:
        variants += [
            ("naive: one prompt at a time", naive),
            (f"transformers generate, padded, batches of {most}", lambda: stock(most)),
            ("continuous batching (generate_batch)", lambda: continuous(use_cuda_graph=False)),
        ]
    if peers and gpu:
        variants += [
            (
                "transformers generate, static cache",
                lambda: stock(rows, cache_implementation="static", disable_compile=True),
            ),
            ("continuous batching, CUDA graphs", lambda: continuous(use_cuda_graph=True)),
            (
                "transformers generate, static cache, with its compilation",
                lambda: stock(rows, cache_implementation="static"),
            ),
            ("the same, compiled before", lambda: stock(rows, cache_implementation="static")),
        ]
    print(
        f"{torch.cuda.get_device_name() if gpu else 'CPU'}, {which}, {rows} prompts of "
        f"120–320 tokens, {new} new tokens each\n"
    )
    print("| variant | tokens/s | against the first | peak GiB |\n|---|---|---|---|")
    with torch.no_grad():  # not inference_mode: generate_batch has its own thread
        ours(None if gpu else 1)  # warm up
        first: float | None = None
        for name, call in variants:
            speed = timed(name, call, first)
            first = speed if first is None else first


SIZES = {True: (1, 32, 512), False: (8, 16)}


def by_loop(call: Callable[[], int]) -> int:
    """Call without CUDA graphs."""
    own = fast.decodes_fast
    fast.decodes_fast = generation.decodes_fast = lambda model: False
    try:
        return call()
    finally:
        fast.decodes_fast = generation.decodes_fast = own


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    if "--check" in sys.argv:
        from generation_checks import check

        check()
    elif "--profile" in sys.argv:
        from generation_checks import profile

        profile()
    else:
        main(
            words[0] if words else "8b",
            int(words[1]) if len(words) > 1 else 256,
            int(words[2]) if len(words) > 2 else 128,
            "--peers" in sys.argv,
        )
