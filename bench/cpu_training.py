"""Tokens/s of SFT on a CPU: this project's way beside plain TRL with padding, on the demo's model and its own conversations.

    python bench/cpu_training.py --store .ft/store --base smollm2-135m --rows 48     # after `ft run`, or its first steps

Both train the same rows with the same adapter in steps of 8; rounds alternate, so that a busy machine hits both.
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


def ours(snapshot: Path, rows: list[dict[str, Any]]) -> float:
    stamps: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        settings = SftSettings(
            num_train_epochs=1, effective_batch=8, learning_rate=1e-3, save_steps=10_000
        )
        train_sft(
            snapshot,
            rows,
            [],
            LORA,
            settings,
            Path(work) / "c",
            Path(work),
            lambda text, **_: text == "train" and stamps.append(time.perf_counter()),
        )
    return stamps[-1] - stamps[0]


def plain(snapshot: Path, rows: list[dict[str, Any]]) -> float:
    stamps = Stamps()
    with tempfile.TemporaryDirectory() as work:
        SFTTrainer(
            model=new_adapter(snapshot, LORA),
            args=SFTConfig(
                output_dir=work, max_length=None, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
                save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, gradient_checkpointing=False,
                bf16=compute_dtype().itemsize == 2,
            ),
            train_dataset=Dataset.from_list([{"input_ids": row["input_ids"], "labels": labels(row)} for row in rows]),
            processing_class=load_tokenizer(snapshot),
            callbacks=[stamps],
        ).train()  # fmt: skip
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
    rows = read_table(store.need("heldout_split", arguments.base).path / "train.parquet")[
        : arguments.rows
    ]
    tokens = sum(len(row["input_ids"]) for row in rows) * (
        1 - 8 / len(rows)
    )  # the first step warms up
    speeds: dict[str, list[float]] = {"plain TRL, padded": [], "ours": []}
    for _ in range(arguments.rounds):
        speeds["plain TRL, padded"].append(tokens / plain(snapshot, rows))
        speeds["ours"].append(tokens / ours(snapshot, rows))
    first = statistics.median(speeds["plain TRL, padded"])
    print(
        f"\n{len(rows)} conversations, {sum(len(row['input_ids']) for row in rows) / len(rows):.0f} tokens on average; {compute_dtype()}"
    )
    print(f"{'way':<20} tokens/s (median)   ratio   rounds")
    for way, found in speeds.items():
        print(
            f"{way:<20} {statistics.median(found):17.1f} {statistics.median(found) / first:7.2f}   {', '.join(f'{speed:.1f}' for speed in found)}"
        )


if __name__ == "__main__":
    main()
