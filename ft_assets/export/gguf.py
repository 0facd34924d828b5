"""Write a merged model of the Llama family as a GGUF file, tensor by tensor, with the `gguf` package.

Llama, Mistral (without a sliding window), Qwen2 and Qwen3. Everything else is refused by name, unless release.llama_cpp names
a folder of llama.cpp, whose own converter then does it. No converter on PyPI could be used: the one there brings a second
`gguf` package that overwrites this one.
"""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
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
from safetensors import safe_open

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
LIBRARY = "set release.llama_cpp to a folder of llama.cpp: its converter does more architectures"


def why_not(folder: Path) -> str | None:
    """Return why this model cannot be written here, None if it can."""
    config = json.loads((folder / "config.json").read_text())
    architecture = config["architectures"][0]
    if architecture not in ARCHITECTURES:
        return f"{architecture} is not one of {', '.join(ARCHITECTURES)}"
    if "sliding_attention" in (config.get("layer_types") or []) or (
        architecture == "MistralForCausalLM" and config.get("sliding_window")
    ):
        return f"{architecture} with a sliding window is not written here"
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        return f"rope scaling {rope['rope_type']} is not written here"
    return None


def write_gguf(
    folder: Path,
    output: Path,
    kind: str,
    name: str,
    license_: str | None,
    llama_cpp: Path | None = None,
) -> dict[str, Any]:
    """Write `output`, kind `f16` or `q8_0`, and return {"tensors", "bytes", "writer", "notes"}. Raises ReleaseError."""
    if llama_cpp is not None:
        return _by_llama_cpp(folder, output, kind, llama_cpp)
    if (reason := why_not(folder)) is not None:
        raise ReleaseError(
            where=f"release.forms: gguf-{kind}",
            found=reason,
            expected=f"one of {', '.join(ARCHITECTURES)}",
            fix=LIBRARY,
        )
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    writer = GGUFWriter(output, MODEL_ARCH_NAMES[arch])
    _add_facts(writer, config, kind, name, license_)
    lost = add_tokenizer(
        writer, folder, config["vocab_size"], _stops(folder), f"release.forms: gguf-{kind}"
    )
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    permuted = arch == MODEL_ARCH.LLAMA
    plan = list(_plan(folder, config, names, kind, permuted, f"release.forms: gguf-{kind}"))
    coarse = sum(entry["fallback"] for entry in plan)
    for entry in plan:
        writer.add_tensor_info(
            entry["name"],
            entry["shape"],
            np.dtype(np.float32),
            entry["bytes"],
            raw_dtype=entry["type"],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in plan:
        writer.write_tensor_data(_converted(entry, config))
    writer.close()
    notes = [
        *lost,
        *([f"{coarse} tensors are F16: their rows are no multiple of 32"] if coarse else []),
    ]
    return {"tensors": len(plan), "bytes": output.stat().st_size, "writer": "gguf", "notes": notes}


def _stops(folder: Path) -> list[int]:
    """Return the stop tokens, the tokenizer's EOS first."""
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    order = eos if isinstance(eos, list) else [eos]
    assert set(order) == stop_ids(folder)
    return order


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or {
        **(config.get("rope_scaling") or {}),
        "rope_theta": config.get("rope_theta", 10000.0),
    }


def _head_size(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _add_facts(
    writer: GGUFWriter, config: dict[str, Any], kind: str, name: str, license_: str | None
) -> None:
    writer.add_name(name)
    writer.add_type("model")
    if license_:
        writer.add_license(license_)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(2)


def _plan(
    folder: Path, config: dict[str, Any], names: Any, kind: str, permuted: bool, where: str
) -> Iterator[dict[str, Any]]:
    """Yield each tensor to write: where it is read, its GGUF name, shape, type and bytes."""
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for source in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                if source == "lm_head.weight" and config.get("tie_word_embeddings"):
                    continue
                target = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise ReleaseError(
                        where=where,
                        found=f"the tensor {source} has no name in GGUF",
                        expected="tensors of the architecture",
                        fix=LIBRARY,
                    )
                shape = file.get_slice(source).get_shape()
                type_, fallback = _type(shape, kind)
                heads = 0
                if permuted and source.endswith(("q_proj.weight", "q_proj.bias")):
                    heads = config["num_attention_heads"]
                elif permuted and source.endswith(("k_proj.weight", "k_proj.bias")):
                    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
                yield _entry(target, shape, type_, fallback, shard, source, heads)
    if _rope(config).get("rope_type") == "llama3":
        yield _entry(
            "rope_freqs.weight",
            [_head_size(config) // 2],
            GGMLQuantizationType.F32,
            False,
            None,
            "",
            0,
        )


def _entry(
    name: str,
    shape: list[int],
    type_: Any,
    fallback: bool,
    shard: Path | None,
    source: str,
    heads: int,
) -> dict[str, Any]:
    block, size = GGML_QUANT_SIZES[type_]
    return {
        "name": name, "shape": shape, "type": type_, "fallback": fallback, "shard": shard, "source": source,
        "heads": heads, "bytes": math.prod(shape) // block * size,
    }  # fmt: skip


def _type(shape: list[int], kind: str) -> tuple[GGMLQuantizationType, bool]:
    """Return (type, whether it is a fallback): norms and biases stay F32, rows that are no whole blocks F16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32, False
    wanted = TYPES[kind][0]
    fits = shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return (wanted, False) if fits else (GGMLQuantizationType.F16, True)


def _converted(entry: dict[str, Any], config: dict[str, Any]) -> np.ndarray:
    if entry["shard"] is None:
        return llama3_factors(config)
    with safe_open(entry["shard"], framework="pt") as file:
        tensor = file.get_tensor(entry["source"]).float()
    if entry["heads"]:
        tensor = interleaved(tensor, entry["heads"])
    array = tensor.numpy()
    if entry["type"] == GGMLQuantizationType.F32:
        return array
    if (
        entry["type"] == GGMLQuantizationType.F16
        and float(np.abs(array).max(initial=0.0)) > np.finfo(np.float16).max
    ):
        raise ReleaseError(
            where=entry["source"],
            found="holds a value that F16 cannot",
            expected="weights below 65504",
            fix="export gguf-q8_0 instead",
        )
    return quantize(array, entry["type"])


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q or k rows in llama.cpp's rotary order, (x₀, y₀, x₁, y₁ …), from transformers' (x₀, x₁ …, y₀, y₁ …), head by head."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """Return what each rotary frequency is divided by, (head size / 2,), fp32: Llama 3.1's scaling, as transformers computes it
    (modeling_rope_utils._compute_llama3_parameters)."""
    rope, size = _rope(config), _head_size(config)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    old = rope["original_max_position_embeddings"]
    wavelengths = (
        2 * math.pi * np.power(rope["rope_theta"], np.arange(0, size, 2, dtype=np.float64) / size)
    )
    smooth = (old / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(
        wavelengths > old / low, factor, np.where(wavelengths < old / high, 1.0, between)
    )
    return factors.astype(np.float32)


def _by_llama_cpp(folder: Path, output: Path, kind: str, llama_cpp: Path) -> dict[str, Any]:
    script = converter(llama_cpp)
    if not script.is_file():
        raise ReleaseError(
            where="release.llama_cpp",
            found=f"there is no {script}",
            expected="a folder of llama.cpp",
            fix="correct the path; it is relative to finetune.yaml",
        )
    command = [
        sys.executable,
        str(script),
        str(folder),
        "--outtype",
        kind,
        "--outfile",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not output.is_file():
        raise ReleaseError(
            where="release.llama_cpp",
            found=f"its converter failed: {_last(done.stderr)}",
            expected="a GGUF file",
            fix=f"try it by hand: {' '.join(command)}",
        )
    return {"tensors": None, "bytes": output.stat().st_size, "writer": "llama.cpp", "notes": []}


def quantize_q4_k_m(source: Path, output: Path, llama_cpp: Path | None) -> dict[str, Any]:
    """Quantize a GGUF file to Q4_K_M with llama.cpp's llama-quantize. Raises ReleaseError where that is not to be found."""
    tool = quantizer(llama_cpp)
    if tool is None and importlib.util.find_spec("llama_cpp"):
        return _quantize_by_binding(source, output)
    if tool is None:
        raise ReleaseError(
            where="release.forms: gguf-q4_k_m",
            found="llama-quantize is not on PATH, and llama-cpp-python is not installed",
            expected="llama.cpp's tools: Q4_K_M is theirs, nothing else writes it",
            fix="install llama.cpp, or set release.llama_cpp to its folder; or use gguf-q8_0",
        )
    done = subprocess.run(
        [str(tool), str(source), str(output), "Q4_K_M"], capture_output=True, text=True, check=False
    )
    if done.returncode or not output.is_file():
        raise ReleaseError(
            where="release.forms: gguf-q4_k_m",
            found=f"llama-quantize failed: {_last(done.stderr)}",
            expected="a GGUF file",
            fix="see its message",
        )
    return {
        "tensors": None,
        "bytes": output.stat().st_size,
        "writer": "llama-quantize",
        "notes": [],
    }


def _quantize_by_binding(source: Path, output: Path) -> dict[str, Any]:
    import llama_cpp  # pyright: ignore[reportMissingImports]  # llama-cpp-python, where the user installed it

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), parameters)
    if code or not output.is_file():
        raise ReleaseError(
            where="release.forms: gguf-q4_k_m",
            found=f"llama-cpp-python's quantization ended with {code}",
            expected="a GGUF file",
            fix="see its log",
        )
    return {
        "tensors": None,
        "bytes": output.stat().st_size,
        "writer": "llama-cpp-python",
        "notes": [],
    }


def _last(text: str) -> str:
    return text.strip().splitlines()[-1][:300] if text.strip() else "it said nothing"
