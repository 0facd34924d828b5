"""Read data files into raw rows. A row keeps its file and line, for the messages.

Formats: JSON lines, a JSON list (by content, whatever the file is called), CSV and TSV with a
header, Parquet, Arrow, and plain texts of one row each. Text files can be compressed (gz, xz, bz2,
zst). All but a JSON list and a plain text are read in pieces.
Not here: the meaning of a row (rows/row_formats.py, canonical.py).
"""

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_assets.data.columnar import table_rows
from ft_assets.data.file_types import DATA, TABLES, TEXT, suffixes
from ft_assets.data.streams import printable, split_lines, text_pieces, whole
from ft_assets.errors import DataError
from ft_assets.rows.types import RawFields

LARGEST_FIELD = 2**27  # characters of a CSV field; the csv module's own limit is 128 KiB
TO_LINES = "write one object a line (JSON lines): `jq -c '.[]' old.json > new.jsonl`"


@dataclass(frozen=True)
class RawRow:
    """A row of a file; `problem` is the reason why it is not an object."""

    where: str
    value: RawFields | None
    problem: str | None = None


def read_rows(
    path: Path, encoding: str | None = None, format: str | None = None
) -> Iterator[RawRow]:
    """Yield the rows of a data file. Raises DataError for a file that cannot be read.

    Text is UTF-8 (with or without BOM) or has a UTF-16/32 BOM, unless `encoding` names another
    encoding. A .txt file is one row {"text": …} if `format` is text, else it is a DataError. An
    error late in a file is raised after the rows before it.
    """
    kind, packed = suffixes(path)
    if kind in TABLES:
        for index, value in enumerate(table_rows(path, kind)):
            yield RawRow(f"{printable(path)}[{index}]", value)
        return
    if kind not in DATA and kind != TEXT:
        raise DataError(
            where=str(path),
            found=f"has the ending {kind or '(none)'}",
            expected=f"one of {', '.join(DATA)}; text files may be compressed",
            fix="rename or convert it",
        )
    if kind == TEXT and format != "text":
        raise DataError(
            where=str(path),
            found="is a plain text",
            expected="rows of conversations",
            fix="name it in data.format, {train: text}, to train on its text",
        )
    pieces = text_pieces(path, packed, encoding)
    if kind == TEXT:
        text = whole(path, pieces, "a text", "split it into several files")
        yield RawRow(printable(path), {"text": text})
    elif kind in (".csv", ".tsv"):
        yield from _csv(path, split_lines(path, pieces, ""), "\t" if kind == ".tsv" else ",")
    else:
        yield from _json(path, pieces)


def _json(path: Path, pieces: Iterator[str]) -> Iterator[RawRow]:
    """Yield the rows of JSON lines or of a JSON list: the first non-blank character decides."""
    begun: list[str] = []
    for piece in pieces:
        begun.append(piece)
        if piece.strip():
            break
    pieces = itertools.chain(begun, pieces)
    if begun and begun[-1].lstrip()[:1] == "[":
        yield from _json_list(path, whole(path, pieces, "a JSON list", TO_LINES))
        return
    for number, line in enumerate(split_lines(path, pieces, "\n"), start=1):
        if line.strip():
            yield _json_line(f"{printable(path)}:{number}", line.removesuffix("\n"))


def _json_line(where: str, line: str) -> RawRow:
    try:
        value = json.loads(line, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return RawRow(where, None, f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RawRow(where, None, f"is not JSON: {error}")
    return _row(where, value)


def _row(where: str, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(where, value)
    return RawRow(where, None, f"is a {type(value).__name__}, not an object")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _json_list(path: Path, text: str) -> Iterator[RawRow]:
    try:
        values = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise DataError(
            where=f"{path}:{error.lineno}",
            found=f"is not JSON: {error.msg}",
            expected="a JSON list of objects, or one object a line",
            fix="correct the line",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            where=str(path),
            found=f"is not JSON: {error}",
            expected="a JSON list of objects",
            fix="correct it",
        ) from None
    for index, value in enumerate(values):
        yield _row(f"{printable(path)}[{index}]", value)


def _csv(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[RawRow]:
    """Yield rows with the header's names.

    `where` names the line on which a row ends, because quoted fields may hold line breaks.
    """
    csv.field_size_limit(LARGEST_FIELD)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # After a broken quote the beginning of the next row is unknown.
            raise DataError(
                where=f"{path}:{reader.line_num}",
                found=f"is not CSV: {error}",
                expected="quoted fields that end",
                fix="correct the line",
            ) from None
        if header is None:
            header = fields
            _check_header(path, header)
            continue
        if not fields:
            continue
        where = f"{printable(path)}:{reader.line_num}"
        if len(fields) != len(header):
            yield RawRow(where, None, f"has {len(fields)} fields; the header has {len(header)}")
        else:
            yield RawRow(where, dict(zip(header, fields, strict=True)))


def _check_header(path: Path, header: list[str]) -> None:
    if len(set(header)) < len(header) or not any(header):
        raise DataError(
            where=f"{path}:1",
            found=f"the header is {header!r}",
            expected="distinct column names",
            fix="add or correct the header",
        )
