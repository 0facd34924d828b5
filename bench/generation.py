"""Measure the evaluation's generation against a naive loop and transformers' own engines.

    python bench/generation.py [8b | <folder of a snapshot>] [rows] [new tokens]

All variants answer the same prompts greedily with an active LoRA adapter. `8b` is the shape of an
8B Llama with random weights. The speed does not depend on their values, and no answer stops early.
Tokens/s count new tokens only.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from ft_assets.hardware import compute_dtype
from ft_assets.inference.generation import generate
from ft_assets.models.loading import load_base


def shape_8b() -> Any:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def adapted(model: Any) -> Any:
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    )
    return model.to(compute_dtype()).eval()


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


def main(which: str, rows: int, new: int) -> None:
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

    def ours(batch: int | None, some: int = rows) -> int:
        generate(
            model, Pad(), prompt_ids[:some], frozenset([model.config.vocab_size - 1]), new, batch
        )
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
    print(
        f"{torch.cuda.get_device_name() if gpu else 'CPU'}, {which}, {rows} prompts of "
        f"120–320 tokens, {new} new tokens each\n"
    )
    print("| variant | tokens/s | against naive | peak GiB |\n|---|---|---|---|")
    with torch.no_grad():  # not inference_mode: generate_batch has its own thread
        ours(None, rows if gpu else 2)  # warm up
        base = timed("naive: one prompt at a time", naive, None)
        timed("this project, its own choice", lambda: ours(None), base)
        timed(
            f"transformers generate, padded, batches of {rows if gpu else 32}",
            lambda: stock(rows if gpu else 32),
            base,
        )
        if gpu:
            timed(
                "the same, static cache",
                lambda: stock(rows, cache_implementation="static", disable_compile=True),
                base,
            )
        timed(
            "continuous batching (generate_batch)", lambda: continuous(use_cuda_graph=False), base
        )
        if gpu:
            timed(
                "continuous batching (generate_batch), CUDA graphs",
                lambda: continuous(use_cuda_graph=True),
                base,
            )
        for size in (32, 128) if gpu else (8, 16):
            timed(f"this project, batches of {size}", lambda size=size: ours(size), base)
        timed("this project, its own choice, again", lambda: ours(None), base)
        if gpu:
            timed(
                "transformers generate, static cache, with its compilation",
                lambda: stock(rows, cache_implementation="static"),
                base,
            )
            timed(
                "the same, compiled before",
                lambda: stock(rows, cache_implementation="static"),
                base,
            )


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else "8b",
        int(sys.argv[2]) if len(sys.argv) > 2 else 256,
        int(sys.argv[3]) if len(sys.argv) > 3 else 128,
    )
