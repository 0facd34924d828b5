"""Write a merged model of the Llama family as a GGUF file.

The tensors are written one by one with the `gguf` package.
Written here: Llama, Mistral (without a sliding window), Qwen2 and Qwen3. All other architectures
are refused by name, unless release.llama_cpp names a folder of llama.cpp, whose own converter then
writes the file. The converter on PyPI cannot be used: it installs a second `gguf` package that
overwrites this one.
"""

import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open

from ft_assets.artifacts.documents import read_document
from ft_assets.errors import ReleaseError
from ft_assets.export.gguf_tokenizer import add_tokenizer
from ft_assets.export.tools import converter, quantizer
from ft_assets.models.loading import stop_ids

ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}
TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
USE_LLAMA_CPP = (
    "set release.llama_cpp to a folder of llama.cpp: its converter supports more architectures"
)
REMAKE = "materialize merged_model again"


class Rope(BaseModel):
    """The rotary embedding of a config.json; the factors belong to Llama 3.1's scaling."""

    model_config = ConfigDict(frozen=True)

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


class Architecture(BaseModel):
    """The keys of config.json that decide if a model can be written here."""

    model_config = ConfigDict(frozen=True)

    architectures: list[str]
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    rope_theta: float = 10000.0

    @property
    def rope(self) -> Rope:
        """The rotary embedding, also in the keys of transformers before version 5."""
        if self.rope_parameters is not None:
            return self.rope_parameters
        return (self.rope_scaling or Rope()).model_copy(update={"rope_theta": self.rope_theta})

    def problem(self) -> str | None:
        """Return the reason why the model cannot be written here, None if it can."""
        name = self.architectures[0]
        if name not in ARCHITECTURES:
            return f"{name} is not one of {', '.join(ARCHITECTURES)}"
        mistral_window = name == "MistralForCausalLM" and self.sliding_window
        if "sliding_attention" in (self.layer_types or []) or mistral_window:
            return f"{name} with a sliding window cannot be written here"
        if self.rope.rope_type not in ("default", "llama3"):
            return f"rope scaling {self.rope.rope_type} cannot be written here"
        return None


class LlamaConfig(Architecture):
    """The keys of config.json that a GGUF file of the Llama family needs."""

    vocab_size: int
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int
    rms_norm_eps: float
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None

    @property
    def arch(self) -> MODEL_ARCH:
        return ARCHITECTURES[self.architectures[0]]

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class WrittenGguf:
    """A written GGUF file; `tensors` is None if llama.cpp's tools wrote it."""

    bytes: int
    writer: str
    tensors: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write, and its place in the model's files.

    shard: None for the rotary factors, which are computed. is_fallback: F16 was taken because the
    rows are not whole blocks of the wanted type. heads: of a q or k weight whose rows are reordered
    for llama.cpp, else 0.
    """

    name: str
    shape: list[int]
    type: GGMLQuantizationType
    is_fallback: bool = False
    shard: Path | None = None
    source: str = ""
    heads: int = 0

    @property
    def bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


def why_not(folder: Path) -> str | None:
    """Return the reason why the model cannot be written here, None if it can."""
    return read_document(folder / "config.json", Architecture, REMAKE).problem()


def write_gguf(
    folder: Path,
    output: Path,
    kind: str,
    name: str,
    license_: str | None,
    llama_cpp: Path | None = None,
) -> WrittenGguf:
    """Write `output` as kind `f16` or `q8_0`. Raises ReleaseError if that is not possible."""
    if llama_cpp is not None:
        return _by_llama_cpp(folder, output, kind, llama_cpp)
    where = f"release.forms: gguf-{kind}"
    if (reason := why_not(folder)) is not None:
        raise ReleaseError(
            where=where,
            found=reason,
            expected=f"one of {', '.join(ARCHITECTURES)}",
            fix=USE_LLAMA_CPP,
        )
    config = read_document(folder / "config.json", LlamaConfig, REMAKE)
    writer = GGUFWriter(output, MODEL_ARCH_NAMES[config.arch])
    _add_metadata(writer, config, kind, name, license_)
    notes = add_tokenizer(writer, folder, config.vocab_size, _stops(folder), where)
    plan = list(_plan(folder, config, kind, where))
    for tensor in plan:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.bytes,
            raw_dtype=tensor.type,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in plan:
        writer.write_tensor_data(_converted(tensor, config))
    writer.close()
    if fallbacks := sum(tensor.is_fallback for tensor in plan):
        notes.append(f"{fallbacks} tensors are F16: their row length is not a multiple of 32")
    return WrittenGguf(output.stat().st_size, "gguf", len(plan), notes)


class _Generation(BaseModel):
    eos_token_id: int | list[int]


def _stops(folder: Path) -> list[int]:
    """Read the stop tokens, the tokenizer's EOS first."""
    eos = read_document(folder / "generation_config.json", _Generation, REMAKE).eos_token_id
    order = eos if isinstance(eos, list) else [eos]
    assert set(order) == stop_ids(folder)
    return order


def _add_metadata(
    writer: GGUFWriter, config: LlamaConfig, kind: str, name: str, license_: str | None
) -> None:
    writer.add_name(name)
    writer.add_type("model")
    if license_:
        writer.add_license(license_)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(2)


def _plan(folder: Path, config: LlamaConfig, kind: str, where: str) -> Iterator[PlannedTensor]:
    """Yield the tensors to write. Raises ReleaseError for a tensor without a name in GGUF."""
    names: Any = get_tensor_name_map(config.arch, config.num_hidden_layers)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for source in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                if source == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                target = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise ReleaseError(
                        where=where,
                        found=f"the tensor {source} does not have a name in GGUF",
                        expected="tensors of the architecture",
                        fix=USE_LLAMA_CPP,
                    )
                shape = file.get_slice(source).get_shape()
                type_, is_fallback = _type(shape, kind)
                heads = _reordered_heads(source, config)
                yield PlannedTensor(target, shape, type_, is_fallback, shard, source, heads)
    if config.rope.rope_type == "llama3":
        shape = [config.head_size // 2]
        yield PlannedTensor("rope_freqs.weight", shape, GGMLQuantizationType.F32)


def _reordered_heads(source: str, config: LlamaConfig) -> int:
    """Return the heads of a q or k tensor that llama.cpp has in another order, else 0."""
    if config.arch != MODEL_ARCH.LLAMA:
        return 0
    if source.endswith(("q_proj.weight", "q_proj.bias")):
        return config.num_attention_heads
    return config.kv_heads if source.endswith(("k_proj.weight", "k_proj.bias")) else 0


def _type(shape: list[int], kind: str) -> tuple[GGMLQuantizationType, bool]:
    """Return a tensor's type, and True if it is a fallback.

    Norms and biases stay F32. Rows that are not whole blocks are F16.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32, False
    wanted = TYPES[kind][0]
    fits = shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return (wanted, False) if fits else (GGMLQuantizationType.F16, True)


def _converted(tensor: PlannedTensor, config: LlamaConfig) -> np.ndarray:
    if tensor.shard is None:
        return llama3_factors(config.rope, config.head_size)
    with safe_open(tensor.shard, framework="pt") as file:
        weight = file.get_tensor(tensor.source).float()
    if tensor.heads:
        weight = interleaved(weight, tensor.heads)
    array = weight.numpy()
    if tensor.type == GGMLQuantizationType.F32:
        return array
    largest = float(np.abs(array).max(initial=0.0))
    if tensor.type == GGMLQuantizationType.F16 and largest > np.finfo(np.float16).max:
        raise ReleaseError(
            where=tensor.source,
            found="holds a value that F16 cannot represent",
            expected="weights below 65504",
            fix="export gguf-q8_0 instead",
        )
    return quantize(array, tensor.type)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder q or k rows, head by head, to llama.cpp's rotary order.

    transformers has (x₀, x₁ …, y₀, y₁ …), llama.cpp has (x₀, y₀, x₁, y₁ …).
    """
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def llama3_factors(rope: Rope, head_size: int) -> np.ndarray:
    """Compute the divisors of the rotary frequencies, (head_size / 2,), fp32.

    This is Llama 3.1's scaling as in transformers' modeling_rope_utils
    (_compute_llama3_parameters).
    """
    old = rope.original_max_position_embeddings
    low = rope.low_freq_factor
    high = rope.high_freq_factor
    exponents = np.arange(0, head_size, 2, dtype=np.float64) / head_size
    wavelengths = 2 * math.pi * np.power(rope.rope_theta, exponents)
    smooth = (old / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / rope.factor + smooth)
    factors = np.where(wavelengths < old / high, 1.0, between)
    return np.where(wavelengths > old / low, rope.factor, factors).astype(np.float32)


def _by_llama_cpp(folder: Path, output: Path, kind: str, llama_cpp: Path) -> WrittenGguf:
    script = converter(llama_cpp)
    if not script.is_file():
        raise ReleaseError(
            where="release.llama_cpp",
            found=f"there is no {script}",
            expected="a folder of llama.cpp",
            fix="correct the path; it is relative to finetune.yaml",
        )
    options = ["--outtype", kind, "--outfile", str(output)]
    command = [sys.executable, str(script), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not output.is_file():
        raise ReleaseError(
            where="release.llama_cpp",
            found=f"its converter failed: {_last_line(done.stderr)}",
            expected="a GGUF file",
            fix=f"run it by hand: {' '.join(command)}",
        )
    return WrittenGguf(output.stat().st_size, "llama.cpp")


def quantize_q4_k_m(source: Path, output: Path, llama_cpp: Path | None) -> WrittenGguf:
    """Quantize a GGUF file to Q4_K_M with llama.cpp's llama-quantize, or its Python binding.

    Raises ReleaseError if neither is installed, or if it fails.
    """
    where = "release.forms: gguf-q4_k_m"
    tool = quantizer(llama_cpp)
    if tool is None and importlib.util.find_spec("llama_cpp"):
        return _quantize_by_binding(source, output, where)
    if tool is None:
        raise ReleaseError(
            where=where,
            found="llama-quantize is not on PATH, and llama-cpp-python is not installed",
            expected="llama.cpp's tools, the only ones that write Q4_K_M",
            fix="install llama.cpp, or set release.llama_cpp to its folder; or use gguf-q8_0",
        )
    command = [str(tool), str(source), str(output), "Q4_K_M"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not output.is_file():
        raise ReleaseError(
            where=where,
            found=f"llama-quantize failed: {_last_line(done.stderr)}",
            expected="a GGUF file",
            fix="see its message",
        )
    return WrittenGguf(output.stat().st_size, "llama-quantize")


def _quantize_by_binding(source: Path, output: Path, where: str) -> WrittenGguf:
    # llama-cpp-python is installed by the user.
    import llama_cpp  # pyright: ignore[reportMissingImports]

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), parameters)
    if code or not output.is_file():
        raise ReleaseError(
            where=where,
            found=f"llama-cpp-python's quantization ended with code {code}",
            expected="a GGUF file",
            fix="see its log",
        )
    return WrittenGguf(output.stat().st_size, "llama-cpp-python")


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:300] if text.strip() else "without a message"
