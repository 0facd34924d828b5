"""Read data files into raw rows. A row keeps its file and line, for the messages.

Formats: JSON in all its forms (json_files.py), CSV and TSV with a header, Parquet, Arrow, and plain
texts of one row each. Text files can be compressed (gz, xz, bz2, zst). JSON lines, CSV and tables
are read in pieces.
Not here: the meaning of a row (rows/row_formats.py, canonical.py).
"""

from collections.abc import Iterator
from pathlib import Path

from ft_assets.data.columnar import table_rows
from ft_assets.data.csv_files import csv_rows
from ft_assets.data.file_types import DATA, TABLES, TEXTS, suffixes
from ft_assets.data.json_files import json_rows
from ft_assets.data.raw_row import RawRow
from ft_assets.data.streams import printable, text_pieces, whole
from ft_assets.errors import DataError


def read_rows(
    path: Path, encoding: str | None = None, format: str | None = None
) -> Iterator[RawRow]:
    """Yield the rows of a data file. Raises DataError for a file that cannot be read.

    Text is UTF-8 (with or without BOM) or has a UTF-16/32 BOM, unless `encoding` names another
    encoding. A .txt or .md file is one row {"text": …} if `format` is text, else it is a
    DataError. An error late in a file is raised after the rows before it.
    """
    kind, packed = suffixes(path)
    if kind in TABLES:
        for index, value in enumerate(table_rows(path, kind)):
            yield RawRow(f"{printable(path)}[{index}]", value)
        return
    if kind not in DATA and kind not in TEXTS:
        raise DataError(
            where=str(path),
            found=f"has the ending {kind or '(none)'}",
            expected=f"one of {', '.join(DATA)}; text files may be compressed",
            fix="rename or convert it",
        )
    if kind in TEXTS and format != "text":
        raise DataError(
            where=str(path),
            found="is a plain text",
            expected="rows of conversations",
            fix="name it in data.text to train on it before SFT, or in data.format, {train: text}, "
            "to train on it beside the conversations",
        )
    pieces = text_pieces(path, packed, encoding)
    if kind in TEXTS:
        text = whole(path, pieces, "a text", "split it into several files")
        yield RawRow(printable(path), {"text": text})
    elif kind in (".csv", ".tsv"):
        yield from csv_rows(path, pieces, "\t" if kind == ".tsv" else ",")
    else:
        yield from json_rows(path, pieces)
