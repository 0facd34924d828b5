"""Read and copy parts of safetensors files as bytes, without loading the rest.

A file is an 8-byte little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, and the tensors
(https://github.com/huggingface/safetensors, "Format"). Not here: changes to a tensor.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ft_assets.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOATING = {"F64", "F32", "F16", "BF16"}
INDEX = "model.safetensors.index.json"
COPY_BLOCK = 1 << 24
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DAMAGED = "the file is damaged: fetch it or make it again"


@dataclass(frozen=True)
class Entry:
    """One tensor of one file: `begin` and `end` are byte offsets from the start of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.bytes // self.rows if self.rows else 0

    def row_shape(self, rows: int) -> tuple[int, ...]:
        return (rows, *self.shape[1:]) if self.shape else ()


@dataclass(frozen=True)
class TensorFile:
    """A file's header, byte for byte, and its tensors by name in the order of their bytes."""

    path: Path
    header: bytes
    metadata: Mapping[str, str]
    entries: dict[str, Entry]

    @property
    def size(self) -> int:
        return len(self.header) + sum(entry.bytes for entry in self.entries.values())


def read_file(path: Path) -> TensorFile:
    """Read a file's header.

    Raises ModelError if the file is not a safetensors file, or its length differs from the header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(
                where=str(path),
                found=f"is truncated, or not a safetensors file: {size} bytes",
                expected=f"a header of {length} bytes and tensors",
                fix=DAMAGED,
            )
        text = file.read(length)
    try:
        parsed = json.loads(text)
        metadata = parsed.pop("__metadata__", None) or {}
        entries = [_entry(path, name, value, 8 + length) for name, value in parsed.items()]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(
            where=str(path),
            found=f"its header cannot be read ({error})",
            expected="a safetensors header",
            fix=DAMAGED,
        ) from None
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _require_contiguous(path, entries, 8 + length, size)
    header = length.to_bytes(8, "little") + text
    return TensorFile(path, header, metadata, {entry.name: entry for entry in entries})


def _entry(path: Path, name: str, value: Mapping[str, Any], start: int) -> Entry:
    first, last = value["data_offsets"]
    return Entry(path, name, value["dtype"], tuple(value["shape"]), start + first, start + last)


def _require_contiguous(path: Path, entries: list[Entry], begin: int, size: int) -> None:
    """Raise ModelError unless the tensors fill the file from byte `begin` to its end."""
    end = begin
    for entry in entries:
        width = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        has_wrong_size = width is not None and entry.bytes != width * math.prod(entry.shape)
        if entry.begin != end or has_wrong_size:
            raise ModelError(
                where=f"{path}: {entry.name}",
                found="its bytes are not at the offsets of the header",
                expected="tensors one after the other",
                fix=DAMAGED,
            )
        end = entry.end
    if end != size:
        raise ModelError(
            where=str(path),
            found=f"is {'truncated' if size < end else 'too long'}: {size} bytes",
            expected=f"{end} bytes by its header",
            fix=DAMAGED,
        )


def read_folder(folder: Path) -> list[TensorFile]:
    """Read the headers of a model's weight files.

    Raises ModelError if there are none, or if the index and the files differ.
    """
    files = [read_file(path) for path in sorted(folder.glob("model*.safetensors"))]
    names = {name: file.path.name for file in files for name in file.entries}
    if not files or len(names) != sum(len(file.entries) for file in files):
        raise ModelError(
            where=str(folder),
            found=f"holds {len(files)} weight files, {len(names)} tensors",
            expected="weights, each once",
            fix="make the model again",
        )
    if (folder / INDEX).exists():
        _require_index(folder / INDEX, names)
    return files


def _require_index(path: Path, names: Mapping[str, str]) -> None:
    """Raise ModelError unless the index lists exactly these tensors in these files."""
    listed = json.loads(path.read_text())["weight_map"]
    missing = sorted(name for name, file in listed.items() if names.get(name) != file)
    if not missing and len(listed) == len(names):
        return
    example = f", {listed[missing[0]]} lacks {missing[0]}" if missing else ""
    counts = f"{len(listed)} tensors listed, {len(names)} found{example}"
    raise ModelError(
        where=str(path),
        found=f"does not fit its files: {counts}",
        expected="the same tensors",
        fix="fetch or make the model again",
    )


def entries_of(files: list[TensorFile]) -> dict[str, Entry]:
    """Return all tensors of a model by name."""
    return {name: entry for file in files for name, entry in file.entries.items()}


def read_rows(descriptor: int, entry: Entry, first: int, last: int) -> torch.Tensor:
    """Read rows first … last-1 of a tensor in its own dtype.

    They are read, not mapped: mapped pages would count as resident memory.
    """
    raw = torch.empty((last - first) * entry.row_bytes, dtype=torch.uint8)
    view = raw.numpy().data
    offset = entry.begin + first * entry.row_bytes
    while len(view):
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise ModelError(
                where=f"{entry.file}: {entry.name}",
                found="the file ended",
                expected=f"{entry.end} bytes",
                fix="it was truncated while it was read: start again",
            )
        view = view[count:]
        offset += count
    return raw.view(DTYPES[entry.dtype]).reshape(entry.row_shape(last - first))


def read_tensor(entry: Entry) -> torch.Tensor:
    """Read a whole tensor in its own dtype."""
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        return read_rows(descriptor, entry, 0, entry.rows)
    finally:
        os.close(descriptor)


def blocks(entry: Entry, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) row ranges of about `block_bytes` bytes."""
    step = max(1, block_bytes // max(1, entry.row_bytes))
    for first in range(0, entry.rows, step):
        yield first, min(entry.rows, first + step)


def write_at(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    """Write a tensor's bytes at an offset."""
    view = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset += count


def copy_range(source: int, target: int, begin: int, end: int, to: int) -> None:
    """Copy bytes begin … end-1 to offset `to`, inside the kernel if it can.

    A file system with reflinks shares the bytes instead of copying them.
    """
    while begin < end:
        try:
            count = os.copy_file_range(source, target, min(end - begin, COPY_BLOCK), begin, to)
        except OSError:  # another file system, or one without it
            data = os.pread(source, min(end - begin, COPY_BLOCK), begin)
            count = os.pwrite(target, data, to) if data else 0
        if count == 0:
            raise ModelError(
                where="copying weights",
                found=f"the file ended at byte {begin}",
                expected=f"{end} bytes",
                fix="it was truncated while it was read: start again",
            )
        begin += count
        to += count
