"""Merge an adapter into its base from disk to disk: W + s·BA in fp32, rounded once to the base's dtype.

Each output file has its base file's header; bytes that no update touches are copied inside the kernel, the rest goes
through memory in blocks of rows. Nothing is ever merged into a 4-bit base: the update is smaller than an NF4 step and
would be rounded away. After QLoRA the base may be the original weights or what NF4 makes of them (`nf4.py`).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ft_assets.errors import ArtifactError, ModelError
from ft_assets.merging.nf4 import quantized_tensors, round_trip
from ft_assets.merging.tensor_files import (
    DTYPES,
    FLOATING,
    INDEX,
    Entry,
    TensorFile,
    blocks,
    copy_range,
    entries_of,
    read_folder,
    read_rows,
    write_at,
)
from ft_assets.merging.updates import EMBEDDING, Update, Updates, read_updates
from ft_assets.models.source import require_unquantized

MergeBase = Literal["original", "dequantized"]
BLOCK_BYTES = (
    1 << 19
)  # of the base's dtype: its fp32 copies stay in the cache, and malloc reuses them instead of mapping fresh pages
MOST_THREADS = 8
NOT_OF_THE_MODEL = {"manifest.json", "facts.json", INDEX}


def merge(
    snapshot: Path, adapter: Path, output: Path, base: MergeBase = "original"
) -> dict[str, Any]:
    """Write the merged model into the empty folder `output`. Returns {"merged_modules", "merged_tensors", "bytes", "method"}.

    An `adapter` without adapter_config.json is the trained weights themselves (full fine-tuning): they are copied, once
    their names, shapes and dtypes are found to be the base's. Raises ModelError, and ArtifactError if the disk is too small.
    """
    require_unquantized(str(snapshot), snapshot)
    files = read_folder(snapshot)
    require_space(output, sum(file.size for file in files))
    for path in sorted(snapshot.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in NOT_OF_THE_MODEL:
            shutil.copy2(path, output / path.name)
    if not (adapter / "adapter_config.json").exists():
        return _copy_full(files, adapter, output)
    tied = bool(
        json.loads((snapshot / "config.json").read_text()).get("tie_word_embeddings", False)
    ) or _head_is_absent(files)
    updates = read_updates(adapter, entries_of(files), tied)
    rounded = quantized_tensors(snapshot) if base == "dequantized" else frozenset[str]()
    plan = _plan(files, updates, output)
    with _one_thread_each():
        for source, target, header, moved in plan:
            _write_file(source, target, header, moved, updates, rounded)
    _write_index(snapshot, output, plan)
    if updates.untie:
        _untie(output / "config.json")
    return {
        "merged_modules": len(updates.changes),
        "merged_tensors": sum(len(moved) for *_, moved in plan),
        "bytes": sum(target.stat().st_size for _, target, _, _ in plan),
        "method": "streaming",
    }


def require_space(output: Path, needed: int) -> None:
    """Raise ArtifactError if fewer than `needed` bytes are free where `output` lies."""
    free = shutil.disk_usage(output).free
    if free < needed + 50_000_000:
        raise ArtifactError(
            where=str(output),
            found=f"{free / 1e9:.2f} GB free",
            expected=f"{needed / 1e9:.2f} GB for the merged weights",
            fix="free some space, or set store: to another disk",
        )


def _head_is_absent(files: list[TensorFile]) -> bool:
    names = entries_of(files)
    return any(EMBEDDING.search(name) for name in names) and not any(
        name.endswith("lm_head.weight") for name in names
    )


Moved = list[tuple[Entry, int, str]]  # (tensor of the base, offset in the new file, its name there)


def _plan(
    files: list[TensorFile], updates: Updates, output: Path
) -> list[tuple[TensorFile, Path, bytes, Moved]]:
    """Return what goes where. A head that parts from its embedding is appended to the embedding's file."""
    plan = []
    for file in files:
        moved: Moved = [(entry, entry.begin, name) for name, entry in file.entries.items()]
        header = file.header
        embedding = next(
            (entry for name, entry in file.entries.items() if EMBEDDING.search(name)), None
        )
        if updates.untie and embedding is not None:
            end = sum(entry.bytes for entry in file.entries.values())
            described = {
                name: {
                    "dtype": entry.dtype,
                    "shape": entry.shape,
                    "data_offsets": [entry.begin - len(header), entry.end - len(header)],
                }
                for name, entry in file.entries.items()
            }
            described["lm_head.weight"] = {
                "dtype": embedding.dtype,
                "shape": embedding.shape,
                "data_offsets": [end, end + embedding.bytes],
            }
            text = json.dumps({"__metadata__": dict(file.metadata), **described}).encode()
            text += b" " * (-len(text) % 8)
            header = len(text).to_bytes(8, "little") + text
            shift = len(header) - len(file.header)
            moved = [(entry, offset + shift, name) for entry, offset, name in moved] + [
                (embedding, len(header) + end, "lm_head.weight")
            ]
        plan.append((file, output / file.path.name, header, moved))
    return plan


def _write_file(
    source: TensorFile,
    target: Path,
    header: bytes,
    moved: Moved,
    updates: Updates,
    rounded: frozenset[str],
) -> None:
    reading = os.open(source.path, os.O_RDONLY)
    writing = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.truncate(writing, len(header) + sum(entry.bytes for entry, _, _ in moved))
        os.posix_fadvise(reading, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the kernel reads further ahead
        os.pwrite(writing, header, 0)
        touched = [item for item in moved if item[2] in updates.changes or item[0].name in rounded]
        kept = [item for item in moved if item not in touched]
        with ThreadPoolExecutor(max(1, min(MOST_THREADS, os.cpu_count() or 1))) as pool:
            tasks: list[tuple[int, Callable[[], None]]] = [
                (begin, partial(copy_range, reading, writing, begin, end, to))
                for begin, end, to in _runs(kept)
            ]
            tasks += [
                (
                    entry.begin,
                    partial(
                        _write_tensor,
                        reading,
                        writing,
                        entry,
                        to,
                        updates.changes.get(name),
                        entry.name in rounded,
                    ),
                )
                for entry, to, name in touched
            ]
            work = [
                pool.submit(task) for _, task in sorted(tasks, key=lambda pair: pair[0])
            ]  # in the order of the disk
            try:
                for done in work:
                    done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        os.close(reading)
        os.close(writing)


def _runs(kept: Moved) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, to) of neighbouring tensors as one range."""
    run: tuple[int, int, int] | None = None
    for entry, to, _ in kept:
        if run is not None and entry.begin == run[1] and to == run[2] + run[1] - run[0]:
            run = (run[0], entry.end, run[2])
            continue
        if run is not None:
            yield run
        run = (entry.begin, entry.end, to)
    if run is not None:
        yield run


def _write_tensor(
    reading: int, writing: int, entry: Entry, to: int, update: Update | None, rounded: bool
) -> None:
    where = f"{entry.file.name}: {entry.name}"
    if entry.dtype not in FLOATING:
        raise ModelError(
            where=where,
            found=f"its dtype is {entry.dtype}",
            expected="16- or 32-bit weights",
            fix="give the base in bf16: nothing is merged into quantized weights",
        )
    apply = update.load() if update is not None else None
    whole = round_trip(read_rows(reading, entry, 0, entry.rows)) if rounded else None
    for first, last in blocks(entry, BLOCK_BYTES):
        rows = whole[first:last] if whole is not None else read_rows(reading, entry, first, last)
        try:
            merged = apply(rows.float(), first) if apply is not None else rows
        except (RuntimeError, IndexError) as error:
            raise ModelError(
                where=where,
                found=f"the adapter's part does not fit {entry.shape} ({error})",
                expected="an adapter of this base",
                fix="train it again",
            ) from None
        if merged.shape != rows.shape:
            raise ModelError(
                where=where,
                found=f"the adapter's part makes {tuple(merged.shape)} of {tuple(rows.shape)}",
                expected="the base's shape",
                fix="train it again",
            )
        merged = merged.to(DTYPES[entry.dtype])
        if not torch.isfinite(merged).all():
            raise ModelError(
                where=where,
                found="the merged weight is not finite",
                expected="finite weights",
                fix="train the adapter again",
            )
        write_at(writing, merged, to + first * entry.row_bytes)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Context in which torch uses one thread a tensor: tensors are merged side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_index(
    snapshot: Path, output: Path, plan: list[tuple[TensorFile, Path, bytes, Moved]]
) -> None:
    if not (snapshot / INDEX).exists():
        return
    index = json.loads((snapshot / INDEX).read_text())
    index["weight_map"] = {
        name: target.name for _, target, _, moved in plan for _, _, name in moved
    }
    index.setdefault("metadata", {})["total_size"] = sum(
        entry.bytes for *_, moved in plan for entry, _, _ in moved
    )
    (output / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _untie(path: Path) -> None:
    config = json.loads(path.read_text())
    for section in (config, config.get("text_config")):
        if section is not None:
            section["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n")


def _copy_full(files: list[TensorFile], trained: Path, output: Path) -> dict[str, Any]:
    """Copy fully trained weights, if they are this base's in name, shape and dtype."""
    ours = read_folder(trained)
    base, new = entries_of(files), entries_of(ours)
    other = sorted(
        name
        for name in {*base, *new}
        if name not in base
        or name not in new
        or (base[name].shape, base[name].dtype) != (new[name].shape, new[name].dtype)
    )
    if other:
        raise ModelError(
            where=str(trained),
            found=f"{len(other)} tensors are not the base's in name, shape or dtype, e.g. {other[0]}",
            expected="weights trained from this base",
            fix="train again",
        )
    for file in ours:
        shutil.copyfile(file.path, output / file.path.name)
    if (trained / INDEX).exists():
        shutil.copyfile(trained / INDEX, output / INDEX)
    return {
        "merged_modules": len(new),
        "merged_tensors": len(new),
        "bytes": sum(file.size for file in ours),
        "method": "copy",
    }
