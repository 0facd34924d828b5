"""Merge an adapter into its base from disk to disk.

The merge computes W + s·BA in fp32 and rounds once to the base's dtype.

Each output file has the header of its base file. Bytes that no update touches are copied inside the
kernel; the others go through memory in blocks of rows. An adapter is never merged into a 4-bit
base, because its update is smaller than an NF4 step and would be rounded away. After QLoRA the base
is either the original weights or their NF4 round trip (`nf4.py`).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

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
from ft_assets.models.text_part import FILE, stored_names

MergeBase = Literal["original", "dequantized"]
# Bytes in the base's dtype. The fp32 copies of a block stay in the cache, and malloc reuses them
# instead of mapping fresh pages.
BLOCK_BYTES = 1 << 19
MAX_THREADS = 8
SPARE_BYTES = 50_000_000  # for the tokenizer, the configs and the card
NOT_COPIED = {"manifest.json", "facts.json", FILE, INDEX}  # these are not files of the model


@dataclass(frozen=True)
class MergeResult:
    """The size of a merge. method: `streaming`, or `copy` if all weights were trained."""

    merged_modules: int
    merged_tensors: int
    bytes: int
    method: Literal["streaming", "copy"]


class Placed(NamedTuple):
    """A tensor of the base, its byte offset in the output file, and its name there."""

    entry: Entry
    offset: int
    name: str


class HeaderEntry(TypedDict):
    """A tensor in a safetensors header; the offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class OutputFile:
    """The plan of one output file: its source, its header, and its tensors in byte order."""

    source: TensorFile
    path: Path
    header: bytes
    tensors: list[Placed]

    @property
    def size(self) -> int:
        return len(self.header) + sum(placed.entry.bytes for placed in self.tensors)


def merge(snapshot: Path, adapter: Path, output: Path, base: MergeBase = "original") -> MergeResult:
    """Write the merged model into the empty folder `output`.

    An `adapter` without adapter_config.json is the trained weights themselves (full fine-tuning).
    They are copied after their names, shapes and dtypes are found equal to the base's.
    Raises ModelError, and ArtifactError if the disk is too small.
    """
    require_unquantized(str(snapshot), snapshot)
    files = read_folder(snapshot)
    require_space(output, sum(file.size for file in files))
    _copy_other_files(snapshot, output)
    if not (adapter / "adapter_config.json").exists():
        return _copy_full(files, adapter, output)
    names = stored_names(snapshot)
    updates = read_updates(adapter, entries_of(files), _is_tied(snapshot, files), names)
    rounded = quantized_tensors(snapshot) if base == "dequantized" else frozenset[str]()
    plan = [_plan_file(file, updates, output) for file in files]
    with _one_torch_thread():
        for planned in plan:
            _write_file(planned, updates, rounded)
    _write_index(snapshot, output, plan)
    if updates.untie:
        _untie(output / "config.json")
    return MergeResult(
        merged_modules=len(updates.changes),
        merged_tensors=sum(len(planned.tensors) for planned in plan),
        bytes=sum(planned.path.stat().st_size for planned in plan),
        method="streaming",
    )


def require_space(folder: Path, needed: int) -> None:
    """Raise ArtifactError if fewer than `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise ArtifactError(
            where=str(folder),
            found=f"{free / 1e9:.2f} GB free",
            expected=f"{needed / 1e9:.2f} GB for the merged weights",
            fix="free some space, or set store: to another disk",
        )


def _copy_other_files(snapshot: Path, output: Path) -> None:
    for path in sorted(snapshot.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in NOT_COPIED:
            shutil.copy2(path, output / path.name)


def _is_tied(snapshot: Path, files: list[TensorFile]) -> bool:
    """Return True if the head of a model is its embedding, by its config or its tensors."""
    config = json.loads((snapshot / "config.json").read_text())
    names = entries_of(files)
    has_embedding = any(EMBEDDING.search(name) for name in names)
    has_head = any(name.endswith("lm_head.weight") for name in names)
    return bool(config.get("tie_word_embeddings", False)) or (has_embedding and not has_head)


def _plan_file(file: TensorFile, updates: Updates, output: Path) -> OutputFile:
    """Plan an output file. An untied lm_head is appended to the file that holds the embedding."""
    tensors = [Placed(entry, entry.begin, name) for name, entry in file.entries.items()]
    embedding = next(
        (entry for name, entry in file.entries.items() if EMBEDDING.search(name)), None
    )
    if not updates.untie or embedding is None:
        return OutputFile(file, output / file.path.name, file.header, tensors)
    end = sum(entry.bytes for entry in file.entries.values())
    header = _header_with_head(file, embedding, end)
    shift = len(header) - len(file.header)
    tensors = [Placed(entry, offset + shift, name) for entry, offset, name in tensors]
    tensors.append(Placed(embedding, len(header) + end, "lm_head.weight"))
    return OutputFile(file, output / file.path.name, header, tensors)


def _header_with_head(file: TensorFile, embedding: Entry, end: int) -> bytes:
    """Build the header of `file` with an lm_head of the embedding's shape at data offset `end`."""
    start = len(file.header)
    described = {
        name: _described(entry, entry.begin - start) for name, entry in file.entries.items()
    }
    described["lm_head.weight"] = _described(embedding, end)
    text = json.dumps({"__metadata__": dict(file.metadata), **described}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _described(entry: Entry, offset: int) -> HeaderEntry:
    end = offset + entry.bytes
    return {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (offset, end)}


def _write_file(planned: OutputFile, updates: Updates, rounded: frozenset[str]) -> None:
    source = os.open(planned.source.path, os.O_RDONLY)
    target = os.open(planned.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.truncate(target, planned.size)
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the kernel reads further ahead
        os.pwrite(target, planned.header, 0)
        tasks = _tasks(source, target, planned.tensors, updates, rounded)
        with ThreadPoolExecutor(max(1, min(MAX_THREADS, os.cpu_count() or 1))) as pool:
            running = [pool.submit(task) for task in tasks]
            try:
                for future in running:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        os.close(source)
        os.close(target)


def _tasks(
    source: int,
    target: int,
    tensors: list[Placed],
    updates: Updates,
    rounded: frozenset[str],
) -> list[Callable[[], None]]:
    """List the copies and merges of one file in the order of their bytes on the disk."""
    tasks: list[tuple[int, Callable[[], None]]] = []
    kept = list[Placed]()
    for placed in tensors:
        entry, offset, name = placed
        update = updates.changes.get(name)
        if update is None and entry.name not in rounded:
            kept.append(placed)
            continue
        nf4 = entry.name in rounded
        task = partial(_write_tensor, source, target, entry, offset, update, nf4)
        tasks.append((entry.begin, task))
    for begin, end, offset in _joined(kept):
        tasks.append((begin, partial(copy_range, source, target, begin, end, offset)))
    return [task for _, task in sorted(tasks, key=lambda pair: pair[0])]


def _joined(kept: Iterable[Placed]) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, output offset) of byte ranges; neighbouring tensors are one range."""
    run: tuple[int, int, int] | None = None
    for entry, offset, _ in kept:
        if run is not None and entry.begin == run[1] and offset == run[2] + run[1] - run[0]:
            run = (run[0], entry.end, run[2])
            continue
        if run is not None:
            yield run
        run = (entry.begin, entry.end, offset)
    if run is not None:
        yield run


def _write_tensor(
    source: int, target: int, entry: Entry, offset: int, update: Update | None, nf4: bool
) -> None:
    """Write one tensor, updated block by block; with `nf4`, the base's part after a round trip."""
    where = f"{entry.file.name}: {entry.name}"
    if entry.dtype not in FLOATING:
        raise ModelError(
            where=where,
            found=f"its dtype is {entry.dtype}",
            expected="16- or 32-bit weights",
            fix="give the base in bf16: an adapter cannot be merged into quantized weights",
        )
    apply = update.load() if update is not None else None
    whole = round_trip(read_rows(source, entry, 0, entry.rows)) if nf4 else None
    for first, last in blocks(entry, BLOCK_BYTES):
        rows = whole[first:last] if whole is not None else read_rows(source, entry, first, last)
        try:
            merged = apply(rows.float(), first) if apply is not None else rows
        except (RuntimeError, IndexError) as error:
            raise ModelError(
                where=where,
                found=f"the adapter's update does not fit the shape {entry.shape} ({error})",
                expected="an adapter of this base",
                fix="train it again",
            ) from None
        if merged.shape != rows.shape:
            shapes = f"{tuple(merged.shape)} instead of {tuple(rows.shape)}"
            raise ModelError(
                where=where,
                found=f"the adapter's update has the shape {shapes}",
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
        write_at(target, merged, offset + first * entry.row_bytes)


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Limit torch to one thread per tensor for the block: tensors are merged in parallel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_index(snapshot: Path, output: Path, plan: list[OutputFile]) -> None:
    if not (snapshot / INDEX).exists():
        return
    index = json.loads((snapshot / INDEX).read_text())
    placed = [(tensor, planned.path.name) for planned in plan for tensor in planned.tensors]
    index["weight_map"] = {tensor.name: file for tensor, file in placed}
    total = sum(tensor.entry.bytes for tensor, _ in placed)
    index.setdefault("metadata", {})["total_size"] = total
    (output / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _untie(path: Path) -> None:
    config = json.loads(path.read_text())
    for section in (config, config.get("text_config")):
        if section is not None:
            section["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n")


def _copy_full(files: list[TensorFile], trained: Path, output: Path) -> MergeResult:
    """Copy fully trained weights. Raises ModelError unless names, shapes and dtypes are equal."""
    trained_files = read_folder(trained)
    base = entries_of(files)
    new = entries_of(trained_files)
    different = sorted(
        name
        for name in {*base, *new}
        if name not in base
        or name not in new
        or (base[name].shape, base[name].dtype) != (new[name].shape, new[name].dtype)
    )
    if different:
        count = f"{len(different)} tensors differ from the base's"
        raise ModelError(
            where=str(trained),
            found=f"{count} in name, shape or dtype, e.g. {different[0]}",
            expected="weights trained from this base",
            fix="train again",
        )
    for file in trained_files:
        shutil.copyfile(file.path, output / file.path.name)
    if (trained / INDEX).exists():
        shutil.copyfile(trained / INDEX, output / INDEX)
    return MergeResult(
        merged_modules=len(new),
        merged_tensors=len(new),
        bytes=sum(file.size for file in trained_files),
        method="copy",
    )
