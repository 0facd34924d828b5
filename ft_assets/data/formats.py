"""Read data files into raw rows. A row keeps the file and line it came from, for the messages.

Containers: JSON lines, a JSON list (by content, whatever the file is called), CSV and TSV with a header, Parquet,
Arrow; each but the last two also compressed (gz, xz, bz2, zst). Not here: what a row means (shapes.py, canonical.py).
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from ft_assets.errors import DataError

TEXT = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
TABLES = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
LARGEST_FIELD = 2**27  # characters of a CSV field; the csv module's own limit is 128 KiB
BOMS = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in a file; `problem` says why it is not an object."""

    where: str
    value: dict[str, Any] | None
    problem: str | None = None


def suffixes(path: Path) -> tuple[str, str]:
    """Return (kind, compression) of a file by its name, e.g. (".jsonl", ".gz")."""
    names = [suffix.lower() for suffix in path.suffixes]
    packed = names.pop() if names and names[-1] in COMPRESSED else ""
    return (names[-1] if names else "", packed)


def resolve_files(root: Path, patterns: list[str], key: str) -> list[Path]:
    """Return the files that patterns (files, folders, globs) name, sorted. Raises DataError for one that matches nothing."""
    files: set[Path] = set()
    for pattern in patterns:
        found: list[Path] = []
        for match in map(Path, glob.glob(str(root / pattern), recursive=True)):
            if match.is_file():
                found.append(match)
            elif match.is_dir():
                found += [path for path in match.rglob("*") if path.is_file() and suffixes(path)[0] in (*TEXT, *TABLES)]
        if not found:
            raise DataError(
                f"finetune.yaml: {key}: {pattern}",
                f"no data file matches below {root}",
                "an existing file, folder or glob",
                "correct the path; it is relative to finetune.yaml",
            )
        files.update(found)
    return sorted(files)


def read_rows(path: Path, encoding: str | None = None) -> Iterator[RawRow]:
    """Yield the rows of a data file. Raises DataError for a file that cannot be read at all.

    Text is UTF-8 (with or without BOM) or has a UTF-16/32 BOM, unless `encoding` names another.
    """
    kind, packed = suffixes(path)
    if kind in TABLES:
        yield from _table(path, kind)
        return
    if kind not in TEXT:
        known = ", ".join((*TEXT, *TABLES))
        raise DataError(str(path), f"has the ending {kind or '(none)'}", f"one of {known}, or a compressed one", "rename or convert it")
    text = _text(path, packed, encoding)
    if kind in (".csv", ".tsv"):
        yield from _csv(path, text, "\t" if kind == ".tsv" else ",")
    elif text.lstrip()[:1] == "[":
        yield from _json_list(path, text)
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _json_line(f"{path.name}:{number}", line)


def _text(path: Path, packed: str, encoding: str | None) -> str:
    opened: dict[str, Callable[[Path], Any]] = {"": lambda name: name.open("rb"), ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    try:
        with opened.get(packed, _zstd)(path) as file:
            data = file.read()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, pa.ArrowException) as error:
        raise DataError(str(path), f"is not a whole {packed} file ({error})", f"a {packed} file", "copy it again") from None
    except OSError as error:
        if packed and error.errno is None:  # the decompressor's own complaint
            raise DataError(str(path), f"is not a whole {packed} file ({error})", f"a {packed} file", "copy it again") from None
        raise DataError(
            str(path), f"cannot be read ({error.strerror or error})", "a readable file", "check the path and its permissions"
        ) from None
    name = encoding or next((name for bom, name in BOMS if data.startswith(bom)), "utf-8-sig")
    try:
        return data.decode(name)
    except LookupError:
        raise DataError("finetune.yaml: data.encoding", f"{name!r} is no encoding", "e.g. latin-1 or cp1252", "correct it") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}",
            f"is not {name.removesuffix('-sig').upper()} (byte {error.start})",
            "UTF-8 text",
            "convert it, or name its encoding in data.encoding, e.g. latin-1: guessing would mangle some letters silently",
        ) from None


def _zstd(path: Path) -> Any:
    return pa.input_stream(str(path), compression="zstd")


def _json_line(where: str, line: str) -> RawRow:
    try:
        value = json.loads(line, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return RawRow(where, None, f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RawRow(where, None, f"is not JSON: {error}")
    if not isinstance(value, dict):
        return RawRow(where, None, f"is a {type(value).__name__}, not an object")
    return RawRow(where, value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _json_list(path: Path, text: str) -> Iterator[RawRow]:
    try:
        values = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}", f"is not JSON: {error.msg}", "a JSON list of objects, or one object a line", "correct the line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(str(path), f"is not JSON: {error}", "a JSON list of objects", "correct it") from None
    for index, value in enumerate(values):
        where = f"{path.name}[{index}]"
        yield RawRow(where, value) if isinstance(value, dict) else RawRow(where, None, f"is a {type(value).__name__}, not an object")


def _csv(path: Path, text: str, delimiter: str) -> Iterator[RawRow]:
    """Yield rows by the header. `where` names the line on which a row ends: quoted fields may hold line breaks."""
    csv.field_size_limit(LARGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # Past a broken quote nobody knows where a row begins.
            raise DataError(f"{path}:{reader.line_num}", f"is not CSV: {error}", "quoted fields that end", "correct the line") from None
        if header is None:
            header = fields
            doubles = {name for name in header if header.count(name) > 1}
            if doubles or not any(header):
                raise DataError(f"{path}:1", f"the header is {fields!r}", "distinct column names", "add or correct the header")
            continue
        if not fields:
            continue
        where = f"{path.name}:{reader.line_num}"
        if len(fields) != len(header):
            yield RawRow(where, None, f"has {len(fields)} fields; the header has {len(header)}")
        else:
            yield RawRow(where, dict(zip(header, fields, strict=True)))


def _table(path: Path, kind: str) -> Iterator[RawRow]:
    try:
        table = pq.read_table(path) if kind == ".parquet" else _arrow(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(str(path), f"cannot be read ({str(error).splitlines()[0][:160]})", f"a {kind} file", "write it again") from None
    index = 0
    for batch in table.to_batches(max_chunksize=1000):
        for value in batch.to_pylist():
            yield RawRow(f"{path.name}[{index}]", value)
            index += 1


def _arrow(path: Path) -> pa.Table:
    try:
        return feather.read_table(path)
    except pa.ArrowInvalid:  # datasets writes the stream form
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_stream(source).read_all()
