"""Read the rows of CSV and TSV files, which have a header."""

import csv
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from ft_assets.data.raw_row import RawRow
from ft_assets.data.streams import printable, split_lines
from ft_assets.errors import DataError

LARGEST_FIELD = 2**27  # characters of a CSV field; the csv module's own limit is 128 KiB
DELIMITERS = (",", ";", "\t", "|")
_DECLARED = re.compile(r"sep=(.)[\r\n]")
LOOKED_AT = 50  # lines that show the delimiter


def csv_rows(path: Path, pieces: Iterator[str], usual: str) -> Iterator[RawRow]:
    """Yield rows with the header's names.

    The fields are separated by `usual`, or by another one of DELIMITERS if that fits and `usual`
    does not: many spreadsheets write semicolons. `where` names the line on which a row ends,
    because quoted fields may hold line breaks.
    """
    csv.field_size_limit(LARGEST_FIELD)
    lines = split_lines(path, pieces, "")
    head = list(itertools.islice(lines, LOOKED_AT))
    declared = _DECLARED.match(head[0]) if head else None  # by a spreadsheet
    delimiter = declared.group(1) if declared else _delimiter(head, usual)
    reader = csv.reader(itertools.chain(head, lines), delimiter=delimiter, strict=True)
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
        if header is None and not fields:  # blank lines above the header
            continue
        if header is None:
            if declared and reader.line_num == 1:
                continue
            header = [name.strip() for name in fields]
            _check_header(path, header)
            continue
        if not fields:
            continue
        where = f"{printable(path)}:{reader.line_num}"
        if len(fields) != len(header):
            yield RawRow(
                where,
                None,
                f"has {len(fields)} fields; the header has {len(header)}",
            )
        else:
            yield RawRow(where, dict(zip(header, fields, strict=True)))


def _delimiter(head: list[str], usual: str) -> str:
    fitting = [one for one in DELIMITERS if _fits(head, one)]
    return usual if usual in fitting or len(fitting) != 1 else fitting[0]


def _fits(head: list[str], delimiter: str) -> bool:
    """Return True if the first rows have the fields of the header, which are two or more."""
    rows = [row for row in csv.reader(head, delimiter=delimiter) if row]
    if len(head) == LOOKED_AT:
        rows = rows[:-1]  # its quoted field may go on
    return bool(rows) and len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows)


def _check_header(path: Path, header: list[str]) -> None:
    if len(set(header)) < len(header) or not any(header):
        raise DataError(
            where=f"{path}:1",
            found=f"the header is {header!r}",
            expected="distinct column names",
            fix="add or correct the header",
        )
