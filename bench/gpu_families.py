"""Train hybrids, text parts and mixtures of a real size on one GPU: speed, and memory against plan.

    python bench/gpu_families.py                       # each family, with random weights
    python bench/gpu_families.py --only "qwen3.5.*QLoRA"
    python bench/gpu_families.py --only qwen3.5 --kernels DIR  # with the packages of this folder

The whole checkpoint is written as a snapshot, whose text part is proven, and trained from there by
`train_sft`: about 16 x 1,024 tokens a step, r 16, dropout 0.05. Each training is a process of its
own. DIR has packages such as flash-linear-attention.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from gpu_ways import STEP_ROWS, Result, Way, train_measured
from random_base import documents, write_tokenizer

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # The defaults of the text part are those of Qwen3.5-9B.
    "qwen3.5-9b": ("qwen3_5", {"text_config": {}, "vision_config": {"out_hidden_size": 4096}}),
    "ministral3-8b": (
        "mistral3",
        {
            "text_config": {"model_type": "ministral3"},
            "vision_config": {"model_type": "pixtral", "image_size": 1540},
            "tie_word_embeddings": False,
        },
    ),
    # The defaults are those of OLMoE-1B-7B.
    "olmoe-7b": ("olmoe", {"intermediate_size": 1024}),
}
# Small enough for a CPU.
_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "head_dim": 16,
}
_EYES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5-9b": (
        "qwen3_5",
        {
            "text_config": {
                **_SMALL,
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
            },
            "vision_config": {**_EYES, "depth": 1, "num_heads": 2, "out_hidden_size": 64},
        },
    ),
    "ministral3-8b": (
        "mistral3",
        {
            "text_config": {"model_type": "ministral3", **_SMALL},
            "vision_config": {"model_type": "pixtral", **_EYES, "num_hidden_layers": 1},
            "tie_word_embeddings": False,
        },
    ),
    "olmoe-7b": ("olmoe", {**_SMALL, "num_experts": 8, "num_experts_per_tok": 2}),
}
TINY["olmoe-7b"][1].pop("head_dim")


class Setup(NamedTuple):
    """A training of a family."""

    family: str
    way: Way


SETUPS = {
    "qwen3.5-9b QLoRA, the plan's choice": Setup("qwen3.5-9b", Way(steps=6)),
    "qwen3.5-9b QLoRA all-linear, the plan's choice": Setup(
        "qwen3.5-9b", Way(steps=6, targets="all-linear")
    ),
    "qwen3.5-9b LoRA, the plan's choice": Setup("qwen3.5-9b", Way(steps=6, method="lora")),
    "qwen3.5-9b LoRA, 1/20 step, no checkpointing": Setup(
        "qwen3.5-9b", Way(steps=3, method="lora", micro_batch=4, gradient_checkpointing=False)
    ),
    "ministral3-8b QLoRA, the plan's choice": Setup("ministral3-8b", Way(steps=9)),
    "ministral3-8b LoRA, the plan's choice": Setup("ministral3-8b", Way(steps=9, method="lora")),
    "ministral3-8b QLoRA FP8, the plan's choice": Setup(
        "ministral3-8b", Way(steps=9, base_compute="fp8")
    ),
    "ministral3-8b QLoRA, 1/4 step, checkpointing": Setup(
        "ministral3-8b", Way(steps=3, micro_batch=20, gradient_checkpointing=True)
    ),
    "olmoe-7b QLoRA, the plan's choice": Setup("olmoe-7b", Way(steps=6)),
    "olmoe-7b LoRA, the plan's choice": Setup("olmoe-7b", Way(steps=6, method="lora")),
    "olmoe-7b LoRA, 1/4 step, checkpointing": Setup(
        "olmoe-7b", Way(steps=3, method="lora", micro_batch=20, gradient_checkpointing=True)
    ),
}


def base(name: str, sizes: tuple[str, dict[str, Any]], folder: Path) -> Path:
    """Write a snapshot with random weights, with its proven text part. Returns its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from ft_assets.models.text_part import FILE, describe, has_parts, text_part
    from ft_assets.models.weight_files import stored_types

    kind, given = sizes
    snapshot = folder / name
    config: Any = AutoConfig.for_model(kind, **given, eos_token_id=1, pad_token_id=0)
    auto: Any = AutoModelForImageTextToText if has_parts(config) else AutoModelForCausalLM
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu") as device:
        model = auto.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(snapshot)
    write_tokenizer(snapshot)
    if has_parts(config):
        with device:
            part = describe(name, model, text_part(name, model), list(stored_types(name, snapshot)))
        (snapshot / FILE).write_text(part.model_dump_json(indent=1))
        print(f"{name}: {part.shown}", flush=True)
    return snapshot


def child(job: str, snapshot: Path) -> None:
    """Train one setup in this process and print its result as JSON."""
    import torch

    torch.set_num_threads(min(8, torch.get_num_threads()))
    way = Way(**json.loads(job))
    vocabulary = json.loads((snapshot / "config.json").read_text())
    vocabulary = {**vocabulary, **vocabulary.get("text_config", {})}["vocab_size"]
    texts = documents(STEP_ROWS * (way.steps or 6), vocabulary)
    result = train_measured(way, snapshot, texts, 0.05)
    print("RESULT " + json.dumps(result), flush=True)


def run(setup: Setup, snapshot: Path, kernels: str) -> Result:
    """Train one setup in its own process, and print what the trainer told."""
    command = [sys.executable, __file__, "--job", json.dumps(dataclasses.asdict(setup.way))]
    paths = [kernels, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*command, "--snapshot", str(snapshot)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=environment,
    )
    told = re.findall(
        r"^(?:packing is off|out of memory|.*falling back to its).*", done.stderr, re.M
    )
    for line in dict.fromkeys(told):
        print(f"    {line[:220]}", flush=True)
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(done.stderr[-2500:], flush=True)
    return json.loads(lines[0]) if lines else {"failed": done.returncode}


def shown(name: str, found: Result, seconds: float) -> str:
    """Return the line of a training."""
    if "failed" in found:
        return f"{name}: failed: {found}"
    predicted, reserved = found["predicted_memory_gb"], found.get("peak_gb", 0.0)
    error = f"{100 * (predicted / reserved - 1):+.1f} %" if reserved else "-"
    return (
        f"{name}: {found.get('tokens_per_s', 0):,} tokens/s, predicted {predicted:.2f} GB, "
        f"reserved {reserved:.2f} GB ({error}), allocated {found.get('allocated_gb', 0):.2f}; "
        f"{found['micro_batch']} rows, {found['largest_micro_batch_tokens']:,} tokens, "
        f"{found['checkpointed_layers']} layers checkpointed, "
        f"{found['layer_kb_per_token']} KB a token and layer, packed {found['packed']}, "
        f"leak {found['packing_leak']}, "
        f"fused {found['fused_linears']}, liger {found['liger']}, loss {found['loss']}, "
        f"{seconds:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="setups whose name matches this")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--kernels", default="", metavar="DIR", help="also with these packages")
    parser.add_argument("--folder", type=Path, help="keep the snapshots here, and use those in it")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--snapshot", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        child(arguments.job, arguments.snapshot)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        measure(arguments, folder)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Print a line of each setup, with and without the packages of --kernels."""
    for family, sizes in (TINY if arguments.tiny else FAMILIES).items():
        chosen = {
            name: setup
            for name, setup in SETUPS.items()
            if setup.family == family and re.search(arguments.only, name)
        }
        if not chosen:
            continue
        begun = time.perf_counter()
        snapshot = folder / family
        if not snapshot.is_dir():
            base(family, sizes, folder)
        print(f"{family}: snapshot in {time.perf_counter() - begun:.0f} s", flush=True)
        for name, setup in chosen.items():
            for kernels in dict.fromkeys(["", arguments.kernels]):
                begun = time.perf_counter()
                found = run(setup, snapshot, kernels)
                label = name + (", --kernels" if kernels else "")
                print(shown(label, found, time.perf_counter() - begun), flush=True)
        if not arguments.folder:
            shutil.rmtree(snapshot)


if __name__ == "__main__":
    main()
