"""Read the rows of a JSON file: objects of one line or of several, a list, or a wrapped list.

The content decides, whatever the file is called. NaN and Infinity are numbers, because a row may
have them in a column that nothing reads. A key that an object has twice is a problem of its row:
JSON keeps only the last value.
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_assets.data.raw_row import RawRow
from ft_assets.data.streams import printable, split_lines, whole
from ft_assets.errors import DataError
from ft_assets.rows.cells import python_object
from ft_assets.rows.row_formats import COMPLETION, CONVERSATIONS, PROMPT
from ft_assets.rows.types import RawFields

TO_LINES = "write one object a line (JSON lines): `jq -c '.[]' old.json > new.jsonl`"
_BLANKS = re.compile("[ \t\r\n\ufeff]*")  # a joined file has byte order marks inside
# The last characters of a line that does not end a value.
_OPEN = ("{", "[", ",", ":")
_OF_ROWS = (*PROMPT, *COMPLETION, *CONVERSATIONS, "chosen", "rejected")


class _Repeated(dict[str, Any]):
    """An object in which `key` occurs twice."""

    key: str


class _Decoder:
    """Decodes JSON; `repeated` is true once an object had a key twice."""

    def __init__(self) -> None:
        self.repeated = False
        # Made once: json.loads makes a decoder for each call with arguments.
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self.value = self._decoder.decode
        self.value_at = self._decoder.raw_decode

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) == len(pairs):
            return value
        self.repeated = True
        marked = _Repeated(value)
        keys = [key for key, _ in pairs]
        marked.key = next(key for key in keys if keys.count(key) > 1)
        return marked

    def checked(self, row: RawRow) -> RawRow:
        """Return a row, or a problem if one of its objects has a key twice."""
        key = _repeated_key(row.value) if self.repeated else None
        if key is None:
            return row
        return RawRow(row.where, None, f"has the key {key!r} twice in one object; remove one")


def _repeated_key(value: Any) -> str | None:
    if isinstance(value, _Repeated):
        return value.key
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((key for part in inner if (key := _repeated_key(part)) is not None), None)


def json_rows(path: Path, pieces: Iterator[str]) -> Iterator[RawRow]:
    """Yield the rows of JSON text. Raises DataError for a text that is not rows."""
    decoder = _Decoder()
    rows = _rows(path, decoder, pieces)
    first = list(itertools.islice(rows, 2))
    alone = first[0].value if len(first) == 1 and not first[0].where.endswith("]") else None
    rows = itertools.chain(first, rows) if alone is None else _unwrapped(path, first[0], alone)
    yield from map(decoder.checked, rows)


def _rows(path: Path, decoder: _Decoder, pieces: Iterator[str]) -> Iterator[RawRow]:
    begun: list[str] = []
    for piece in pieces:
        begun.append(piece)
        if _end_of_blanks(piece, 0) < len(piece):
            break
    pieces = itertools.chain(begun, pieces)
    if begun and begun[-1][_end_of_blanks(begun[-1], 0) :][:1] == "[":
        yield from _elements(path, decoder, whole(path, pieces, "a JSON list", TO_LINES))
        return
    # A text in JSON has no raw "\r", so it always ends a line.
    lines = enumerate(split_lines(path, pieces, ""), start=1)
    numbered = ((number, line) for number, line in lines if line.strip())
    head = list(itertools.islice(numbered, 2))
    if head and head[0][1].rstrip().endswith(_OPEN) and not _is_object(head[-1][1], len(head) > 1):
        start = ["\n" * (head[0][0] - 1), *(line for _, line in head)]
        texts = itertools.chain(start, (line for _, line in lines))
        text = whole(path, texts, "JSON of several lines", TO_LINES)
        yield from _elements(path, decoder, text)
    else:
        yield from _lines(path, decoder, itertools.chain(head, numbered))


def _end_of_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found else at


def _is_object(line: str, is_second: bool) -> bool:
    """Return True if a second line is a row of its own: then the first one is a broken row."""
    try:
        return is_second and line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(path: Path, decoder: _Decoder, numbered: Iterator[tuple[int, str]]) -> Iterator[RawRow]:
    name = printable(path)
    for number, line in numbered:
        where = f"{name}:{number}"
        try:
            value = decoder.value(line.lstrip("\ufeff"))
        except json.JSONDecodeError as error:
            problem = f"is not JSON: {error.msg} at column {error.colno}"
            value = python_object(line)
            yield RawRow(where, None, problem) if value is None else RawRow(where, value)
        except (ValueError, RecursionError) as error:
            yield RawRow(where, None, f"is not JSON: {error}")
        else:
            yield RawRow.of(where, value)


def _elements(path: Path, decoder: _Decoder, text: str) -> Iterator[RawRow]:
    """Yield the elements of a JSON list, or objects that follow each other."""
    name, at = printable(path), _end_of_blanks(text, 0)
    listed = text[at] == "["
    end, index, line, counted = ("]" if listed else ""), 0, 1, 0
    at = _end_of_blanks(text, at + 1) if listed else at
    while text[at : at + 1] != end:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _value_at(path, decoder, text, at)
        yield RawRow.of(f"{name}[{index}]" if listed else f"{name}:{line}", value)
        index, at = index + 1, _end_of_blanks(text, at)
        if text[at : at + 1] == ",":
            at = _end_of_blanks(text, at + 1)
            if listed and text[at : at + 1] == end:
                raise _not_json(path, json.JSONDecodeError("Expecting value", text, at))
        elif listed and text[at : at + 1] != end:
            raise _not_json(path, json.JSONDecodeError("Expecting ',' delimiter", text, at))
    if listed and (at := _end_of_blanks(text, at + 1)) < len(text):
        raise _not_json(path, json.JSONDecodeError("Extra data", text, at))


def _value_at(path: Path, decoder: _Decoder, text: str, at: int) -> tuple[Any, int]:
    try:
        return decoder.value_at(text, at)
    except (ValueError, RecursionError) as error:
        raise _not_json(path, error) from None


def _not_json(path: Path, error: Exception) -> DataError:
    is_known = isinstance(error, json.JSONDecodeError)
    return DataError(
        where=f"{path}:{error.lineno}" if is_known else str(path),
        found=f"is not JSON: {error.msg if is_known else error}",
        expected="a JSON list of objects, or one object a line",
        fix="correct the line" if is_known else "correct it",
    )


def _unwrapped(path: Path, row: RawRow, value: RawFields) -> Iterator[RawRow]:
    """Yield the rows of `{"data": [...]}`, or the row itself. Raises DataError for columns."""
    lists = {key: part for key, part in value.items() if _is_list_of_rows(key, part)}
    if "rows" in lists and "features" in lists:  # an answer of the hub's viewer
        value = {"rows": [part.get("row", part) for part in lists["rows"]]}
        lists = value
    if any(isinstance(value.get(key), str) or _is_turns(value.get(key)) for key in _OF_ROWS):
        yield row
    elif len(lists) > 1:
        key = next(iter(lists))
        raise DataError(
            where=str(path),
            found="holds several lists of rows: "
            + ", ".join(f"{key} ({len(part)})" for key, part in lists.items()),
            expected="the rows of one split in a file",
            fix="write each list to a file of its own, e.g. "
            f"`jq -c '.[\"{key}\"][]' {path.name} > {key}.jsonl`",
        )
    elif all(key.isdecimal() and isinstance(part, dict) for key, part in value.items()):
        for key, part in value.items():
            yield RawRow.of(f"{printable(path)}:{key}", part)
    elif _is_columns(value):
        raise DataError(
            where=str(path),
            found=f"is one object of the columns {', '.join(value)}",
            expected="one object a row",
            fix='write it by rows; pandas: `frame.to_json(name, orient="records", lines=True)`',
        )
    elif lists:
        ((key, parts),) = lists.items()
        for index, part in enumerate(parts):
            yield RawRow.of(f"{printable(path)}:{key}[{index}]", part)
    else:
        yield row


def _is_list_of_rows(key: str, value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value) and key not in ("tools", "functions")
    return is_list and all(isinstance(part, dict) for part in value) and not _is_turns(value)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(part, dict) and ("role" in part or "from" in part) for part in value
    )


def _is_columns(value: RawFields) -> bool:
    """Return True for {"prompt": ["a", "b"], …}, or pandas' {"prompt": {"0": "a"}, …}."""
    parts = list(value.values())
    if len(parts) < 2:
        return False
    if {"columns", "data"} <= value.keys() <= {"columns", "data", "index"}:
        return True
    if all(isinstance(part, dict) for part in parts):
        return "0" in parts[0] and all(part.keys() == parts[0].keys() for part in parts)
    if not all(isinstance(part, list) for part in parts):
        return False
    return len({len(part) for part in parts}) == 1 and not any(map(_is_turns, parts))
