"""The formats in which a released model is served, each in its own folder with its command.

A format that cannot be written here is refused with the reason; none is skipped silently.
"""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ft_assets.artifacts.documents import read_document
from ft_assets.errors import ReleaseError
from ft_assets.export import readers
from ft_assets.export.gguf import WrittenGguf, quantize_q4_k_m, write_gguf
from ft_assets.export.ollama import modelfile
from ft_assets.models.loading import load_base, load_tokenizer
from ft_assets.rows.types import Message

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
TEMPLATE = "chat_template.jinja"
GGUF = ("gguf-f16", "gguf-q8_0", "gguf-q4_k_m")
COPIED = ("tokenizer", "chat_template", "generation_config", "special_tokens", "README")


class ServingFacts(BaseModel):
    """The facts of a model that its files do not have.

    name: the partition. license: the licence's identifier. llama_cpp: a folder of llama.cpp. base,
    revision: the base's hub id and commit, or its folder.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    license: str | None = None
    llama_cpp: Path | None = None
    base: str
    revision: str | None = None


@dataclass(frozen=True)
class WrittenFormat:
    """A written format and the commands that serve it. file, gguf: of the GGUF formats only."""

    bytes: int
    writer: str
    notes: list[str]
    serve: list[str]
    file: str | None = None
    gguf: WrittenGguf | None = None


@dataclass(frozen=True)
class Source:
    """The folders that a format is made from; `adapter` is None if the store does not have it."""

    merged: Path
    base: Path
    adapter: Path | None = None


def make_format(
    name: str,
    source: Source,
    output: Path,
    facts: ServingFacts,
    prompts: Sequence[Sequence[Message]],
) -> WrittenFormat:
    """Write a format into the new folder `output`. Raises ReleaseError if it cannot be written.

    prompts: the held-out prompts on which an Ollama template is compared with the model's own.
    """
    output.mkdir(parents=True)
    if name in GGUF:
        return _gguf(name, source.merged, output, facts, prompts)
    if name == "nf4":
        return _nf4(source.merged, output)
    if name == "adapter":
        return _adapter(source, output, facts)
    raise ReleaseError(
        where=f"release.forms: {name}",
        found="no maintained library writes AWQ with these versions: llmcompressor needs an older "
        "transformers, autoawq is no longer maintained",
        expected="a format that can be written and tested here",
        fix="use nf4 or a GGUF format; or run llmcompressor on the merged model in its own "
        "environment",
    )


def _gguf(
    name: str,
    merged: Path,
    output: Path,
    facts: ServingFacts,
    prompts: Sequence[Sequence[Message]],
) -> WrittenFormat:
    kind = name.removeprefix("gguf-")
    file = output / f"{facts.name}-{kind.upper()}.gguf"
    if kind == "q4_k_m":
        whole = output / ".f16.gguf"
        write_gguf(merged, whole, "f16", facts.name, facts.license, facts.llama_cpp)
        try:
            written = quantize_q4_k_m(whole, file, facts.llama_cpp)
        finally:
            whole.unlink()
    else:
        written = write_gguf(merged, file, kind, facts.name, facts.license, facts.llama_cpp)
    text, problem = modelfile(file.name, merged, prompts, readers.adds_bos(file))
    (output / "Modelfile").write_text(text, encoding="utf-8")
    serve = [f"llama-server -m {file.name} --jinja"]
    notes = list(written.notes)
    if problem is None:
        serve.insert(0, f"ollama create {facts.name} -f Modelfile")
    else:
        notes.append(f"not for Ollama, which would not use its chat template: it {problem}")
    return WrittenFormat(written.bytes, written.writer, notes, serve, file.name, written)


def _nf4(merged: Path, output: Path) -> WrittenFormat:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ReleaseError(
            where="release.forms: nf4",
            found="bitsandbytes is not installed",
            expected="bitsandbytes",
            fix="pip install bitsandbytes",
        )
    model = load_base(merged, quantized=True)
    # Before any forward pass: on some CPUs the first one repacks the weights permanently.
    model.save_pretrained(output)
    for path in merged.iterdir():
        if path.is_file() and path.name.startswith(COPIED):
            shutil.copy2(path, output / path.name)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    serve = [f"vllm serve {output.name}  # vLLM reads NF4 without conversion"]
    return WrittenFormat(size, "bitsandbytes", [], serve)


class LoraSettings(BaseModel):
    """The keys of adapter_config.json that decide if vLLM loads an adapter."""

    model_config = ConfigDict(frozen=True)

    r: int
    rank_pattern: dict[str, int] | None = None
    use_dora: bool | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    @property
    def vllm_rank(self) -> int | None:
        """The smallest --max-lora-rank of vLLM that is not below the adapter's ranks."""
        largest = max([self.r, *(self.rank_pattern or {}).values()])
        return next((rank for rank in VLLM_RANKS if rank >= largest), None)

    def problem(self) -> str | None:
        """Return the reason why vLLM does not load the adapter, None if it does.

        The rules are those of its lora/peft_helper.py and config/lora.py.
        """
        if self.use_dora:
            return "vLLM does not load DoRA (lora.use_dora)"
        for key in ("modules_to_save", "trainable_token_indices"):
            if getattr(self, key):
                return f"vLLM loads only low-rank weights (lora.{key})"
        if self.vllm_rank is None:
            return f"vLLM does not load ranks above {VLLM_RANKS[-1]}"
        return None


def _adapter(source: Source, output: Path, facts: ServingFacts) -> WrittenFormat:
    adapter = source.adapter
    if adapter is None or not (adapter / "adapter_config.json").is_file():
        raise ReleaseError(
            where="release.forms: adapter",
            found="the adapter of this model is not in the store",
            expected="a LoRA adapter",
            fix="materialize lora_adapter again",
        )
    path = adapter / "adapter_config.json"
    settings = read_document(path, LoraSettings, "materialize lora_adapter again")
    if (problem := settings.problem()) is not None:
        raise ReleaseError(
            where="release.forms: adapter",
            found=problem,
            expected="a plain LoRA adapter",
            fix="serve the merged model, or a GGUF format or nf4 of it",
        )
    weights = output / "adapter_model.safetensors"
    shutil.copy2(adapter / weights.name, weights)
    origin = {"base_model_name_or_path": facts.base, "revision": facts.revision}
    config = {**json.loads(path.read_text()), **origin}
    (output / path.name).write_text(json.dumps(config, indent=1))
    template = load_tokenizer(source.base).chat_template
    (output / TEMPLATE).write_text(template, encoding="utf-8")
    revision = f" --revision {facts.revision}" if facts.revision else ""
    command = (
        f"vllm serve {facts.base}{revision} --enable-lora --max-lora-rank {settings.vllm_rank} "
        f"--lora-modules {facts.name}=./adapter --chat-template ./adapter/{TEMPLATE}"
    )
    note = "on the original base, with the chat template that was trained with"
    return WrittenFormat(weights.stat().st_size, "peft", [note], [command])
