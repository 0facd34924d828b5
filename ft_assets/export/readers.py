"""Ask an exported form the questions that the merged model was asked, with readers that share no code with the writer.

A GGUF file is read by transformers' own loader and, where llama-cpp-python is installed, by llama.cpp through its chat
endpoint: its own tokenizer, its own rendering of the template, its own idea of where to stop.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.errors import ReleaseError
from ft_assets.hardware import compute_dtype, free_memory
from ft_assets.inference.generation import generate
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets.rows.types import Message

Messages = list[Message]
SPARE = 64  # tokens of llama.cpp's context beyond prompt and answer: its own rendering may be a little longer


@dataclass(frozen=True)
class Expected:
    """What the merged model answers to a prompt: `answer` as text, and as `ids` with the token that it stops at.

    `accepted`: at each of these, the tokens that count as the most likely one: the first of its logits, and those that bf16, in
    which it is stored and usually served, could not tell apart from it.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str
    ids: tuple[int, ...]
    accepted: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Found:
    """What a form answers, and its most likely token at each place of the expected answers."""

    answers: list[str]
    tops: list[list[int]]


def agreement(expected: Sequence[Expected], found: Found) -> dict[str, float]:
    """Return {"top1", "greedy"}: the share of the expected answers' tokens that are the form's most likely ones too (given what
    stands before them), and the share of equal greedy answers. A greedy answer is another from its first near-tie on."""
    hits = [
        token in good
        for one, tops in zip(expected, found.tops, strict=True)
        for good, token in zip(one.accepted, tops, strict=True)
    ]
    same = [one.answer == answer for one, answer in zip(expected, found.answers, strict=True)]
    return {"top1": sum(hits) / len(hits), "greedy": sum(same) / len(same)}


def by_merged(folder: Path, asked: Sequence[Messages], most: int) -> tuple[list[Expected], str]:
    """Return what the forms are measured by, and in which dtype its logits were computed: fp32 where that fits into memory."""
    model, tokenizer, stops = load_base(folder), load_tokenizer(folder), stop_ids(folder)
    prompts = _prompts(tokenizer, stops, asked)
    answers = generate(model, tokenizer, prompts, stops, most)
    grows = sum(weight.numel() * (4 - weight.element_size()) for weight in model.parameters())
    model = model.float() if grows < 0.9 * free_memory() else model
    renderer = Renderer(tokenizer, stops)
    return [
        Expected(
            renderer.text(messages, generation_prompt=True),
            tuple(prompt),
            answer.text.strip(),
            answer.ids,
            tuple(_accepted(logits) for logits in _forced(model, prompt, answer.ids)),
        )
        for messages, prompt, answer in zip(asked, prompts, answers, strict=True)
    ], str(model.dtype).removeprefix("torch.")


def _accepted(logits: torch.Tensor) -> frozenset[int]:
    top = logits.max()
    return frozenset(
        (logits >= top - torch.finfo(torch.bfloat16).eps * top.abs()).nonzero().flatten().tolist()
    )


@torch.inference_mode()
def _forced(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Return the logits at each of `ids`, given the prompt and those before it: (tokens, vocabulary), fp32."""
    model.eval()
    whole = torch.tensor([[*prompt, *ids]], device=model.device)
    return model(input_ids=whole, logits_to_keep=len(ids) + 1).logits[0, :-1].float()


def _prompts(tokenizer: Any, stops: frozenset[int], asked: Sequence[Messages]) -> list[list[int]]:
    prompts = list[list[int]]()
    for prompt in Renderer(tokenizer, stops).prompts(
        [{"messages": messages} for messages in asked]
    ):
        if isinstance(prompt, ProofFailed):
            raise ReleaseError(
                where="smoke test",
                found=f"a held-out prompt cannot be rendered: {prompt}",
                expected="the merged model's template",
                fix="report it",
            )
        prompts.append(prompt)
    return prompts


def _ask(
    model: Any,
    tokenizer: Any,
    stops: frozenset[int],
    asked: Sequence[Messages],
    expected: Sequence[Expected],
    most: int,
) -> Found:
    """Return what a loaded model says. Raises ReleaseError for a prompt that its template refuses."""
    prompts = _prompts(tokenizer, stops, asked)
    answers = [answer.text.strip() for answer in generate(model, tokenizer, prompts, stops, most)]
    tops = [
        _forced(model, prompt, one.ids).argmax(-1).tolist()
        for prompt, one in zip(prompts, expected, strict=True)
    ]
    return Found(answers, tops)


def by_transformers_gguf(
    file: Path, asked: Sequence[Messages], expected: Sequence[Expected], most: int
) -> Found:
    """Weights, tokenizer, template and stop tokens all from the GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    settings: Any = GgufConfig(dequantize=True, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=settings, dtype=compute_dtype()
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if torch.cuda.is_available():
        model = model.to("cuda")
    return _ask(model, tokenizer, frozenset(gguf_stops(file)), asked, expected, most)


def by_llama_cpp(
    file: Path, asked: Sequence[Messages], expected: Sequence[Expected], most: int
) -> Found | None:
    """Return what llama.cpp says, on the GPU where it was built for one; None where llama-cpp-python is not installed.

    The context is as long as prompt and answer need: the model's own would take gigabytes of keys and values.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp  # pyright: ignore[reportMissingImports]

    room = max(len(one.prompt_ids) + max(most, len(one.ids)) for one in expected) + SPARE
    model = llama_cpp.Llama(str(file), n_ctx=room, n_gpu_layers=-1, logits_all=True, verbose=False)
    try:
        said = [
            model.create_chat_completion(messages, temperature=0, max_tokens=most)
            for messages in asked
        ]
        answers = [one["choices"][0]["message"]["content"].strip() for one in said]
        tops = list[list[int]]()
        for one in expected:
            prompt = model.tokenize(one.prompt.encode(), add_bos=False, special=True)
            model.reset()
            model.eval([*prompt, *one.ids])
            tops.append(
                model.scores[len(prompt) - 1 : len(prompt) + len(one.ids) - 1].argmax(-1).tolist()
            )
    finally:
        model.close()
    return Found(answers, tops)


def by_transformers(
    folder: Path, asked: Sequence[Messages], expected: Sequence[Expected], most: int
) -> Found:
    """A folder that carries its own quantization (NF4)."""
    return _ask(load_base(folder), load_tokenizer(folder), stop_ids(folder), asked, expected, most)


def by_adapter(
    base: Path, adapter: Path, asked: Sequence[Messages], expected: Sequence[Expected], most: int
) -> Found:
    """The adapter on the original base, by PEFT."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base), str(adapter))
    with torch.inference_mode():
        return _ask(model, load_tokenizer(base), stop_ids(base), asked, expected, most)


def gguf_text(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field is not None else None


def adds_bos(file: Path) -> bool | None:
    """Return whether llama.cpp puts BOS before every text of this file, None where the file does not say."""
    return gguf_text(GGUFReader(file), "tokenizer.ggml.add_bos_token")


def gguf_stops(file: Path) -> list[int]:
    """Return the stop tokens of a GGUF file: EOS, end of turn, end of message."""
    reader = GGUFReader(file)
    found = [gguf_text(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return [stop for stop in found if stop is not None]


def carried_over(file: Path, folder: Path) -> dict[str, bool]:
    """Return whether the GGUF file holds the model folder's template, stop tokens and all of its tokens."""
    reader, tokenizer = GGUFReader(file), load_tokenizer(folder)
    tokens = gguf_text(reader, "tokenizer.ggml.tokens")
    vocabulary = tokenizer.get_vocab()
    config = json.loads((folder / "config.json").read_text())
    return {
        "template": gguf_text(reader, "tokenizer.chat_template") == tokenizer.chat_template,
        "stop_tokens": set(gguf_stops(file)) == stop_ids(folder),
        "tokens": all(tokens[number] == text for text, number in vocabulary.items())
        and len(tokens) == config["vocab_size"],
        "finite": all(
            bool(torch.isfinite(torch.from_numpy(t.data.copy())).all())
            for t in reader.tensors
            if t.data.dtype.kind == "f"
        ),
    }
