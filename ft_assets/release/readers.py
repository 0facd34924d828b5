"""Ask an exported form the questions that the merged model was asked, with readers that share no code with the writer.

A GGUF file is read by transformers' own loader and, where llama-cpp-python is installed, by llama.cpp through its chat
endpoint: its own tokenizer, its own rendering of the template, its own idea of where to stop.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.errors import ReleaseError
from ft_assets.evaluation.generation import generate
from ft_assets.models.loading import compute_dtype, load_base, load_tokenizer, stop_ids

Messages = list[dict[str, Any]]


def answers(model: Any, tokenizer: Any, stops: frozenset[int], asked: Sequence[Messages], most: int) -> list[str]:
    """Return the greedy answers of a loaded model, as text. Raises ReleaseError for a prompt that the template refuses."""
    prompts = Renderer(tokenizer, stops).prompts([{"messages": messages} for messages in asked])
    for prompt in prompts:
        if isinstance(prompt, ProofFailed):
            raise ReleaseError("smoke test", f"a held-out prompt cannot be rendered: {prompt}", "the merged model's template", "report it")
    return [answer.text.strip() for answer in generate(model, tokenizer, prompts, stops, most)]  # pyright: ignore[reportArgumentType]


def by_merged(folder: Path, asked: Sequence[Messages], most: int) -> list[str]:
    return answers(load_base(folder), load_tokenizer(folder), stop_ids(folder), asked, most)


def by_transformers_gguf(file: Path, asked: Sequence[Messages], most: int) -> list[str]:
    """Weights, tokenizer, template and stop tokens all from the GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    settings: Any = GgufConfig(dequantize=True, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=settings, dtype=compute_dtype())
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return answers(model, tokenizer, frozenset(gguf_stops(file)), asked, most)


def by_llama_cpp(file: Path, asked: Sequence[Messages], most: int) -> list[str] | None:
    """Return llama.cpp's answers, None where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp  # pyright: ignore[reportMissingImports]

    model = llama_cpp.Llama(str(file), n_ctx=0, verbose=False)
    found = [model.create_chat_completion(messages, temperature=0, max_tokens=most) for messages in asked]
    return [one["choices"][0]["message"]["content"].strip() for one in found]


def by_transformers(folder: Path, asked: Sequence[Messages], most: int) -> list[str]:
    """A folder that carries its own quantization (NF4)."""
    from transformers import AutoModelForCausalLM

    return answers(
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True), load_tokenizer(folder), stop_ids(folder), asked, most
    )


def by_adapter(base: Path, adapter: Path, asked: Sequence[Messages], most: int) -> list[str]:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base), str(adapter))
    with torch.inference_mode():
        return answers(model, load_tokenizer(base), stop_ids(base), asked, most)


def agreement(one: Sequence[str], other: Sequence[str]) -> float:
    """Return the share of equal answers."""
    return sum(left == right for left, right in zip(one, other, strict=True)) / len(one)


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
        "tokens": all(tokens[number] == text for text, number in vocabulary.items()) and len(tokens) == config["vocab_size"],
        "finite": all(bool(torch.isfinite(torch.from_numpy(t.data.copy())).all()) for t in reader.tensors if t.data.dtype.kind == "f"),
    }
