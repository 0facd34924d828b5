"""Measure the tokens/s of SFT on a CPU: ft_assets, and plain TRL with padding.

    python bench/cpu_training.py --store .ft/store --base smollm2-135m --rows 48

Run it after `ft run`, or after its first steps. Both train on the demo's model and data, with the
same rows and the same adapter, in steps of 8. Rounds alternate, so that a busy machine slows both.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import LoraSettings, SftSettings
from ft_assets.data.tables import read_table
from ft_assets.hardware import compute_dtype
from ft_assets.models.loading import load_tokenizer
from ft_assets.rows.types import TokenizedRow
from ft_assets.training.adapter import new_adapter
from ft_assets.training.sft import labels, train_sft

LORA = LoraSettings(
    method="lora", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
)


class Stamps(TrainerCallback):
    """The time of each optimizer step."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.stamps.append(time.perf_counter())


def ours(snapshot: Path, rows: list[TokenizedRow]) -> float:
    stamps: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        settings = SftSettings(
            num_train_epochs=1, effective_batch=8, learning_rate=1e-3, save_steps=10_000
        )
        train_sft(
            snapshot=snapshot,
            rows=rows,
            validation=[],
            lora=LORA,
            sft=settings,
            checkpoints=Path(work) / "c",
            output=Path(work),
            report=lambda text, **_: text == "train" and stamps.append(time.perf_counter()),
        )
    return stamps[-1] - stamps[0]


def plain(snapshot: Path, rows: list[TokenizedRow]) -> float:
    stamps = Stamps()
    with tempfile.TemporaryDirectory() as work:
        table = [{"input_ids": row["input_ids"], "labels": labels(row)} for row in rows]
        args = SFTConfig(
            output_dir=work,
            max_length=None,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            bf16=compute_dtype().itemsize == 2,
        )
        SFTTrainer(
            model=new_adapter(snapshot, LORA),
            args=args,
            train_dataset=Dataset.from_list(table),
            processing_class=load_tokenizer(snapshot),
            callbacks=[stamps],
        ).train()
    return stamps.stamps[-1] - stamps.stamps[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, default=Path(".ft/store"))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    store = ArtifactStore(arguments.store.resolve())
    snapshot = store.need("base_model", arguments.base).path
    split = store.need("heldout_split", arguments.base).path
    rows = read_table(split / "train.parquet", arguments.rows, row=TokenizedRow)
    total = sum(len(row["input_ids"]) for row in rows)
    tokens = total * (1 - 8 / len(rows))  # the first step warms up
    speeds: dict[str, list[float]] = {"plain TRL, padded": [], "ours": []}
    for _ in range(arguments.rounds):
        speeds["plain TRL, padded"].append(tokens / plain(snapshot, rows))
        speeds["ours"].append(tokens / ours(snapshot, rows))
    first = statistics.median(speeds["plain TRL, padded"])
    mean = total / len(rows)
    print(f"\n{len(rows)} conversations, {mean:.0f} tokens on average; {compute_dtype()}")
    print(f"{'way':<20} tokens/s (median)   ratio   rounds")
    for way, found in speeds.items():
        median = statistics.median(found)
        rounds = ", ".join(f"{speed:.1f}" for speed in found)
        print(f"{way:<20} {median:17.1f} {median / first:7.2f}   {rounds}")


if __name__ == "__main__":
    main()
