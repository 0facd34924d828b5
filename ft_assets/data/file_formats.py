"""Read data files into raw rows. A row keeps the file and line it came from, for the messages.

Containers: JSON lines, a JSON list (by content, whatever the file is called), CSV and TSV with a header, Parquet,
Arrow, and texts of one row each; text files also compressed (gz, xz, bz2, zst). All but a JSON list and a text are read
in pieces. Not here: what a row means (shapes.py, canonical.py).
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
from ft_assets.data.sources import resolve_files
from ft_assets.data.streams import printable, split_lines, text_pieces, whole
from ft_assets.errors import DataError

__all__ = ["RawRow", "read_rows", "resolve_files"]
LARGEST_FIELD = 2**27  # characters of a CSV field; the csv module's own limit is 128 KiB
TO_LINES = "write one object a line (JSON lines): `jq -c '.[]' old.json > new.jsonl`"


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in a file; `problem` says why it is not an object."""

    where: str
    value: dict[str, Any] | None
    problem: str | None = None


def read_rows(
    path: Path, encoding: str | None = None, format: str | None = None
) -> Iterator[RawRow]:
    """Yield the rows of a data file. Raises DataError for a file that cannot be read.

    Text is UTF-8 (with or without BOM) or has a UTF-16/32 BOM, unless `encoding` names another. A .txt file is one row
    {"text": …} where `format` is text, else refused. What is wrong late in a file is raised after the rows before it.
    """
    kind, packed = suffixes(path)
    if kind in TABLES:
        for index, value in enumerate(table_rows(path, kind)):
            yield RawRow(f"{printable(path)}[{index}]", value)
        return
    if kind not in DATA and kind != TEXT:
        known = ", ".join(DATA)
        raise DataError(
            where=str(path),
            found=f"has the ending {kind or '(none)'}",
            expected=f"one of {known}, or a compressed one",
            fix="rename or convert it",
        )
    if kind == TEXT and format != "text":
        raise DataError(
            where=str(path),
            found="is a plain text",
            expected="rows of a conversation",
            fix="name it in data.format, {train: text}, to train on its text",
        )
    pieces = text_pieces(path, packed, encoding)
    if kind == TEXT:
        yield RawRow(
            printable(path), {"text": whole(path, pieces, "a text", "split it into several files")}
        )
    elif kind in (".csv", ".tsv"):
        yield from _csv(path, split_lines(path, pieces, ""), "\t" if kind == ".tsv" else ",")
    else:
        yield from _json(path, pieces)


def _json(path: Path, pieces: Iterator[str]) -> Iterator[RawRow]:
    """Yield the rows of JSON lines, or of a JSON list: the first character that is no blank decides."""
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
    return (
        RawRow(where, value)
        if isinstance(value, dict)
        else RawRow(where, None, f"is a {type(value).__name__}, not an object")
    )


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


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
    """Yield rows by the header. `where` names the line on which a row ends: quoted fields may hold line breaks."""
    csv.field_size_limit(LARGEST_FIELD)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # Past a broken quote nobody knows where a row begins.
            raise DataError(
                where=f"{path}:{reader.line_num}",
                found=f"is not CSV: {error}",
                expected="quoted fields that end",
                fix="correct the line",
            ) from None
        if header is None:
            header = fields
            doubles = {name for name in header if header.count(name) > 1}
            if doubles or not any(header):
                raise DataError(
                    where=f"{path}:1",
                    found=f"the header is {fields!r}",
                    expected="distinct column names",
                    fix="add or correct the header",
                )
            continue
        if not fields:
            continue
        where = f"{printable(path)}:{reader.line_num}"
        if len(fields) != len(header):
            yield RawRow(where, None, f"has {len(fields)} fields; the header has {len(header)}")
        else:
            yield RawRow(where, dict(zip(header, fields, strict=True)))
