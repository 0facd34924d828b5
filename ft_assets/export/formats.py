"""The forms in which a released model is served, each in a folder of its own, with the line that serves it.

A form that cannot be made here is refused with the reason; nothing is left out silently.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from ft_assets.errors import ReleaseError
from ft_assets.export import readers
from ft_assets.export.gguf import quantize_q4_k_m, write_gguf
from ft_assets.export.ollama import modelfile
from ft_assets.models.loading import load_base, load_tokenizer

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
TEMPLATE = "chat_template.jinja"
GGUF = ("gguf-f16", "gguf-q8_0", "gguf-q4_k_m")


def make_form(
    form: str, merged: Path, base: Path, adapter: Path | None, output: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write a form to `output` and return what there is to say of it. Raises ReleaseError where it cannot be made.

    facts: {"name", "license", "llama_cpp", "base", "revision", "asked"}: the partition, the licence identifier or None, a
    folder or None, what the base is called and its commit or None, and held-out prompts.
    """
    output.mkdir(parents=True)
    if form in GGUF:
        return _gguf(form, merged, output, facts)
    if form == "nf4":
        return _nf4(merged, output)
    if form == "adapter":
        return _adapter(base, adapter, output, facts)
    raise ReleaseError(
        where=f"release.forms: {form}",
        found="no kept library writes AWQ beside these versions: llmcompressor wants an older transformers, autoawq is no longer maintained",
        expected="a form that can be made and tested here",
        fix="use nf4 or a GGUF form; or run llmcompressor on the merged model in an environment of its own",
    )


def _gguf(form: str, merged: Path, output: Path, facts: dict[str, Any]) -> dict[str, Any]:
    file = output / f"{facts['name']}-{form.removeprefix('gguf-').upper()}.gguf"
    llama_cpp = Path(facts["llama_cpp"]) if facts["llama_cpp"] else None
    if form == "gguf-q4_k_m":
        whole = output / ".f16.gguf"
        write_gguf(merged, whole, "f16", facts["name"], facts["license"], llama_cpp)
        try:
            made = quantize_q4_k_m(whole, file, llama_cpp)
        finally:
            whole.unlink()
    else:
        made = write_gguf(
            merged, file, form.removeprefix("gguf-"), facts["name"], facts["license"], llama_cpp
        )
    text, why_not = modelfile(file.name, merged, facts["asked"], readers.adds_bos(file))
    (output / "Modelfile").write_text(text, encoding="utf-8")
    by_ollama = [] if why_not else [f"ollama create {facts['name']} -f Modelfile"]
    notes = (
        [f"not for Ollama, which would not use its chat template: it {why_not}"] if why_not else []
    )
    served = [*by_ollama, f"llama-server -m {file.name} --jinja"]
    return {**made, "file": file.name, "serve": served, "notes": [*made["notes"], *notes]}


def _nf4(merged: Path, output: Path) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ReleaseError(
            where="release.forms: nf4",
            found="bitsandbytes is not installed",
            expected="bitsandbytes",
            fix="pip install bitsandbytes",
        )
    model = load_base(merged, quantized=True)
    model.save_pretrained(
        output
    )  # before any forward pass: on some CPUs that repacks the weights for good
    for path in merged.iterdir():
        if path.is_file() and path.name.startswith(
            ("tokenizer", "chat_template", "generation_config", "special_tokens", "README")
        ):
            shutil.copy2(path, output / path.name)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return {
        "bytes": size,
        "writer": "bitsandbytes",
        "notes": [],
        "serve": [f"vllm serve {output.name}  # NF4 is read as it is"],
    }


def _adapter(
    base: Path, adapter: Path | None, output: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    if adapter is None or not (adapter / "adapter_config.json").is_file():
        raise ReleaseError(
            where="release.forms: adapter",
            found="the adapter of this model is not in the store",
            expected="a LoRA adapter",
            fix="materialize lora_adapter again",
        )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy2(adapter / name, output / name)
    config = json.loads((output / "adapter_config.json").read_text())
    if (reason := why_not_vllm(config)) is not None:
        raise ReleaseError(
            where="release.forms: adapter",
            found=reason,
            expected="a plain LoRA adapter",
            fix="serve the merged model, or a GGUF form or nf4 of it",
        )
    config |= {"base_model_name_or_path": facts["base"], "revision": facts["revision"]}
    (output / "adapter_config.json").write_text(json.dumps(config, indent=1))
    (output / TEMPLATE).write_text(load_tokenizer(base).chat_template, encoding="utf-8")
    revision = f" --revision {facts['revision']}" if facts["revision"] else ""
    line = (
        f"vllm serve {facts['base']}{revision} --enable-lora --max-lora-rank {vllm_rank(config)} "
        f"--lora-modules {facts['name']}=./adapter --chat-template ./adapter/{TEMPLATE}"
    )
    note = "on the original base, with the chat template that was trained with"
    return {
        "bytes": (output / "adapter_model.safetensors").stat().st_size,
        "writer": "peft",
        "notes": [note],
        "serve": [line],
    }


def why_not_vllm(config: dict[str, Any]) -> str | None:
    """Return why vLLM does not load an adapter (its lora/peft_helper.py and config/lora.py), None if it does."""
    if config.get("use_dora"):
        return "vLLM loads no DoRA (lora.use_dora)"
    for key in ("modules_to_save", "trainable_token_indices"):
        if config.get(key):
            return f"vLLM loads no weights beside the low-rank ones (lora.{key})"
    return f"vLLM loads no rank above {VLLM_RANKS[-1]}" if vllm_rank(config) is None else None


def vllm_rank(config: dict[str, Any]) -> int | None:
    """Return the smallest --max-lora-rank that vLLM knows and an adapter fits into."""
    largest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return next((rank for rank in VLLM_RANKS if rank >= largest), None)
