"""Measure LoRA SFT with DDP and with FSDP on a random Llama shape: tokens/s and peak memory.

    python bench/fsdp.py                 # 8B, all GPUs of this machine
    python bench/fsdp.py --layers 80 --hidden 8192 --intermediate 28672 --heads 64
    python bench/fsdp.py --layers 2 --hidden 64 --intermediate 128 --heads 4 --kv-heads 2 \\
        --vocabulary 512 --ranks 2       # on a CPU

Both run like in a project, with launcher, step and memory plan. The disk must have space for the
weights in bf16 (8B: 16 GB). The peak is that of the first rank. A variant that does not fit prints
its refusal. The measurement excludes the first steps.
"""

import argparse
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from gpu_ways import WARM
from random_base import LLAMA_8B, LlamaShape, documents, llama_config, snapshot

from ft_assets.config.launcher import AccelerateSettings
from ft_assets.errors import FtError
from ft_assets.hardware import visible_gpus
from ft_assets.job import Job
from ft_assets.launchers.accelerate import AccelerateLauncher


def write_weights(shape: LlamaShape, folder: Path) -> None:
    """Write random bf16 weights, one file for each layer.

    So the whole model is never in memory.
    """
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(shape))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index: dict[str, str] = {}
    (folder / "model.safetensors").unlink()  # a header without weights
    for file, weights in itertools.groupby(
        model.state_dict().items(),
        lambda pair: f"model-{pair[0].rpartition('.layers.')[2].split('.')[0]}.safetensors",
    ):
        tensors = {
            name: torch.ones(weight.shape, dtype=torch.bfloat16)
            if "norm" in name
            else torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
            .normal_(std=0.02)
            .cpu()
            for name, weight in weights
        }
        file = f"{len(index):05}-{file}"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(way: str, base: Path, rows: Path, given: argparse.Namespace) -> str:
    """Train one variant and return its line of the table."""
    home = Path(tempfile.mkdtemp())
    (home / "output").mkdir()
    sft = {
        "num_train_epochs": 1,
        "effective_batch": given.effective,
        "micro_batch": given.micro,
        "save_steps": 10_000,
        "keep": "last",
        "gradient_checkpointing": given.checkpointing,
    }
    job = Job(
        step="sft",
        gpu=True,
        distributed=True,
        asset="bench",
        partition=None,
        fingerprint=way,
        output=home / "output",
        checkpoints=home / "checkpoints",
        work=home / "work",
        settings={"lora": {"method": "lora", "r": 16}, "sft": sft},
        inputs={"base_model": base, "heldout_split": rows},
    )
    stamps: list[float] = []
    launcher = AccelerateLauncher(
        AccelerateSettings(kind="accelerate", processes=given.ranks, sharding=way)
    )  # type: ignore[arg-type]
    try:
        found = launcher.run(
            job, lambda line: stamps.append(line["time"]) if line["message"] == "train" else None
        ).metrics
    except FtError as refused:
        return f"| {way} | {refused.found} | | | | | |"
    steps = len(stamps) - WARM
    speed = found["train_tokens"] / len(stamps) * steps / (stamps[-1] - stamps[WARM - 1])
    cells = [
        way,
        f"{speed:,.0f}",
        found["micro_batch"],
        found["checkpointed_layers"],
        f"{found['predicted_memory_gb']:.2f}",
        f"{found['peak_train_memory_gb']:.2f}",
        f"{found['loss_first']:.4f}, {found['loss_last']:.4f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    shape = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "intermediate": "intermediate_size",
        "heads": "num_attention_heads",
        "kv-heads": "num_key_value_heads",
        "vocabulary": "vocab_size",
    }
    for name, key in shape.items():
        parser.add_argument(f"--{name}", dest=key, type=int, default=LLAMA_8B[key])
    parser.add_argument("--ranks", type=int, default=len(visible_gpus()) or 2)
    parser.add_argument(
        "--effective",
        type=int,
        default=64,
        help="conversations of about 210 tokens an optimizer step",
    )
    parser.add_argument(
        "--micro",
        type=int,
        help="of these, at once on a rank; by default the memory plan decides for each way",
    )
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="by default the memory plan decides",
    )
    parser.add_argument("--steps", type=int, default=16)
    given = parser.parse_args()
    chosen: Any = {key: getattr(given, key) for key in shape.values()}
    wanted: LlamaShape = {**LLAMA_8B, **chosen}
    base = snapshot(wanted)
    rows = Path(tempfile.mkdtemp())
    write_weights(wanted, base)
    made = [
        {
            "id": str(number),
            "group": str(number),
            "input_ids": ids,
            "supervised": [False] + [True] * (len(ids) - 1),
        }
        for number, ids in enumerate(documents(given.effective * given.steps, wanted["vocab_size"]))
    ]
    pq.write_table(pa.Table.from_pylist(made), rows / "train.parquet")
    pq.write_table(pa.Table.from_pylist(made[:2]), rows / "validation.parquet")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    size = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e9
    print(
        f"{given.ranks} ranks on {where}; {size:.1f} GB of weights, "
        f"{given.effective} conversations in a step\n"
    )
    print(
        "| way | tokens/s, all ranks | micro-batch | checkpointed layers | predicted GB per rank"
        " | peak GB per rank | loss first, last |"
    )
    print("|---|---:|---:|---:|---:|---:|---|")
    for way in ("ddp", "fsdp"):
        print(measure(way, base, rows, given), flush=True)
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
