"""Run an exported format on the merged model's prompts, with readers independent of the writer.

A GGUF file is read by transformers' own loader and, if llama-cpp-python is installed, by llama.cpp
through its chat endpoint, with its own tokenizer, template rendering and stop tokens.
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
from ft_assets.export.export_report import Agreement
from ft_assets.hardware import compute_dtype, free_memory
from ft_assets.inference.generation import generate
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets.rows.types import Conversation, Message

Prompt = Sequence[Message]
# Tokens of llama.cpp's context beyond prompt and answer: its own rendering may be a little longer.
SPARE = 64


@dataclass(frozen=True)
class Expected:
    """The merged model's answer to a prompt, as text and as ids with the stop token.

    accepted: for each of the ids, the tokens that count as the most likely one: the one with the
    largest logit, and those within the rounding of bf16, in which the model is stored and usually
    served.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str
    ids: tuple[int, ...]
    accepted: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Found:
    """A format's answers, and its most likely token at each position of the expected answers."""

    answers: list[str]
    tops: list[list[int]]


def agreement(expected: Sequence[Expected], found: Found) -> Agreement:
    """Compare a format's answers with the expected ones."""
    hits = [
        token in good
        for one, tops in zip(expected, found.tops, strict=True)
        for good, token in zip(one.accepted, tops, strict=True)
    ]
    same = [one.answer == answer for one, answer in zip(expected, found.answers, strict=True)]
    return Agreement(top1=sum(hits) / len(hits), greedy=sum(same) / len(same))


def by_merged(
    folder: Path, prompts: Sequence[Prompt], max_new_tokens: int
) -> tuple[list[Expected], str]:
    """Compute the merged model's answers and the dtype of its logits.

    The logits are computed in fp32 if that fits into memory.
    """
    model = load_base(folder)
    tokenizer = load_tokenizer(folder)
    stops = stop_ids(folder)
    encoded = _encoded(tokenizer, stops, prompts)
    answers = generate(model, tokenizer, encoded, stops, max_new_tokens)
    growth = sum(weight.numel() * (4 - weight.element_size()) for weight in model.parameters())
    model = model.float() if growth < 0.9 * free_memory() else model
    renderer = Renderer(tokenizer, stops)
    expected = [
        Expected(
            renderer.text(messages, generation_prompt=True),
            tuple(ids),
            answer.text.strip(),
            answer.ids,
            tuple(_accepted(logits) for logits in _forced(model, ids, answer.ids)),
        )
        for messages, ids, answer in zip(prompts, encoded, answers, strict=True)
    ]
    return expected, str(model.dtype).removeprefix("torch.")


def _accepted(logits: torch.Tensor) -> frozenset[int]:
    """Return the tokens whose logits (V,) bf16 could round to the largest one."""
    top = logits.max()
    slack = torch.finfo(torch.bfloat16).eps * top.abs()
    return frozenset((logits >= top - slack).nonzero().flatten().tolist())


@torch.inference_mode()
def _forced(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Compute the logits of each of `ids` after the prompt: (tokens, V), fp32."""
    model.eval()
    whole = torch.tensor([[*prompt, *ids]], device=model.device)
    return model(input_ids=whole, logits_to_keep=len(ids) + 1).logits[0, :-1].float()


def _encoded(tokenizer: Any, stops: frozenset[int], prompts: Sequence[Prompt]) -> list[list[int]]:
    """Render and encode prompts. Raises ReleaseError for one that the template refuses."""
    rows = [Conversation(messages=list(messages)) for messages in prompts]
    encoded = list[list[int]]()
    for prompt in Renderer(tokenizer, stops).prompts(rows):
        if isinstance(prompt, ProofFailed):
            raise ReleaseError(
                where="export",
                found=f"a held-out prompt cannot be rendered: {prompt}",
                expected="the chat template of the merged model, which renders all of them",
                fix="this is a bug in ft_assets: please report it",
            )
        encoded.append(prompt)
    return encoded


def _answer(
    model: Any,
    tokenizer: Any,
    stops: frozenset[int],
    prompts: Sequence[Prompt],
    expected: Sequence[Expected],
    max_new_tokens: int,
) -> Found:
    """Answer the prompts with a loaded model. Raises ReleaseError if its template refuses one."""
    encoded = _encoded(tokenizer, stops, prompts)
    answers = generate(model, tokenizer, encoded, stops, max_new_tokens)
    tops = [
        _forced(model, ids, one.ids).argmax(-1).tolist()
        for ids, one in zip(encoded, expected, strict=True)
    ]
    return Found([answer.text.strip() for answer in answers], tops)


def by_transformers_gguf(
    file: Path, prompts: Sequence[Prompt], expected: Sequence[Expected], max_new_tokens: int
) -> Found:
    """Answer with weights, tokenizer, template and stop tokens all from the GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    settings: Any = GgufConfig(dequantize=True, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=settings, dtype=compute_dtype()
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if torch.cuda.is_available():
        model = model.to("cuda")
    stops = frozenset(gguf_stops(file))
    return _answer(model, tokenizer, stops, prompts, expected, max_new_tokens)


def by_llama_cpp(
    file: Path, prompts: Sequence[Prompt], expected: Sequence[Expected], max_new_tokens: int
) -> Found | None:
    """Answer with llama.cpp, on the GPU if it was built for one.

    Returns None if llama-cpp-python is not installed. The context has the length of prompt and
    answer: the model's own would take gigabytes of keys and values.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp  # pyright: ignore[reportMissingImports]

    longest = max(len(one.prompt_ids) + max(max_new_tokens, len(one.ids)) for one in expected)
    model = llama_cpp.Llama(
        str(file), n_ctx=longest + SPARE, n_gpu_layers=-1, logits_all=True, verbose=False
    )
    try:
        completions = [
            model.create_chat_completion(messages, temperature=0, max_tokens=max_new_tokens)
            for messages in prompts
        ]
        answers = [one["choices"][0]["message"]["content"].strip() for one in completions]
        tops = list[list[int]]()
        for one in expected:
            prompt = model.tokenize(one.prompt.encode(), add_bos=False, special=True)
            model.reset()
            model.eval([*prompt, *one.ids])
            logits = model.scores[len(prompt) - 1 : len(prompt) + len(one.ids) - 1]
            tops.append(logits.argmax(-1).tolist())
    finally:
        model.close()
    return Found(answers, tops)


def by_transformers(
    folder: Path, prompts: Sequence[Prompt], expected: Sequence[Expected], max_new_tokens: int
) -> Found:
    """Answer with a model folder that has its own quantization (NF4)."""
    model = load_base(folder)
    tokenizer = load_tokenizer(folder)
    return _answer(model, tokenizer, stop_ids(folder), prompts, expected, max_new_tokens)


def by_adapter(
    base: Path,
    adapter: Path,
    prompts: Sequence[Prompt],
    expected: Sequence[Expected],
    max_new_tokens: int,
) -> Found:
    """Answer with the adapter on the original base, loaded by PEFT."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base), str(adapter))
    tokenizer = load_tokenizer(base)
    with torch.inference_mode():
        return _answer(model, tokenizer, stop_ids(base), prompts, expected, max_new_tokens)


def gguf_text(reader: GGUFReader, key: str) -> Any:
    """Return the value of a key in the file's metadata, None if it does not have the key."""
    field = reader.get_field(key)
    return field.contents() if field is not None else None


def adds_bos(file: Path) -> bool | None:
    """Return True if llama.cpp puts BOS before every text; None if the file has no such key."""
    return gguf_text(GGUFReader(file), "tokenizer.ggml.add_bos_token")


def gguf_stops(file: Path) -> list[int]:
    """Return the stop tokens of a GGUF file: EOS, end of turn, end of message."""
    reader = GGUFReader(file)
    found = [gguf_text(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return [stop for stop in found if stop is not None]


def carried_over(file: Path, folder: Path) -> dict[str, bool]:
    """Check that a GGUF file has a model folder's template, stop tokens and tokens.

    `finite`: none of its floating-point tensors has NaN or infinity.
    """
    reader = GGUFReader(file)
    tokenizer = load_tokenizer(folder)
    tokens = gguf_text(reader, "tokenizer.ggml.tokens")
    vocabulary = tokenizer.get_vocab()
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    has_tokens = all(tokens[number] == text for text, number in vocabulary.items())
    return {
        "template": gguf_text(reader, "tokenizer.chat_template") == tokenizer.chat_template,
        "stop_tokens": set(gguf_stops(file)) == stop_ids(folder),
        "tokens": has_tokens and len(tokens) == size,
        "finite": all(
            bool(torch.isfinite(torch.from_numpy(tensor.data.copy())).all())
            for tensor in reader.tensors
            if tensor.data.dtype.kind == "f"
        ),
    }
