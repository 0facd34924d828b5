"""Trace rows to the entries of finetune.yaml: unique names of files, and the entry of each row.

An entry is a path of data.train or data.rehearsal. Where a key has several, raw_dataset has a table
with the entry of each of its rows.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq

from ft_assets.config import MIXED, DataSettings, Project, Source
from ft_assets.data.data_files import resolve_files
from ft_assets.data.raw_row import RawRow
from ft_assets.errors import DataError

pc: Any = compute  # its functions are made when it is imported
PART = "origins"  # of raw_dataset: its table and its version
SCHEMA = pa.schema([("key", pa.string()), ("id", pa.string()), ("entry", pa.string())])
Names = Mapping[Path, str]
Numbers = npt.NDArray[np.int64]  # of entries


@dataclass(frozen=True)
class DataFile:
    """A file of an entry. `address`: what tells it apart, its path or its URL."""

    entry: str
    address: PurePath


def files_of(project: Project, key: str) -> dict[Path, DataFile]:
    """Return the files of a key of `data`, sorted, each with its first entry.

    Raises DataError if two entries have a file, and one of them sets how much of it is trained.
    """
    found: dict[Path, DataFile] = {}
    mixed = any(one.mixed for one in project.data.sources(key)) if key in MIXED else False
    for entry in project.data.paths(key):
        name = Source(path=entry).name
        files = resolve_files(project.root, [entry], f"data.{key}")
        for path in files:
            other = found.setdefault(path, DataFile(name, _address(name, path))).entry
            if mixed and other != name:
                raise DataError(
                    where=f"finetune.yaml: data.{key}",
                    found=f"{path.name} is a file of {other} and of {name}",
                    expected="each file in one entry: an entry sets how much of it is trained",
                    fix="change the paths, so that none matches a file of another one",
                )
    return dict(sorted(found.items()))


def _address(entry: str, path: Path) -> PurePath:
    """Return the path of a local file, or the URL of a fetched one that its entry names.

    The hash of a query is the first part: it tells two URLs apart.
    """
    url, _, query = entry.partition("?")
    if "://" not in entry or PurePath(url).name != path.name:
        return path
    return PurePath(query, url) if query else PurePath(url)


def names_of(files: Mapping[Path, DataFile]) -> Names:
    """Return the name of each file in messages: the shortest end of its path that is unique."""
    names: dict[Path, str] = {}
    waiting, parts = list(files), 0
    while waiting:
        parts += 1
        ends = {path: _printable(files[path].address.parts[-parts:]) for path in waiting}
        counts = Counter(ends.values())
        # A path of one part, or all of it, cannot be made longer.
        done = [
            path
            for path in waiting
            if counts[ends[path]] == 1 or parts >= len(files[path].address.parts)
        ]
        names |= {path: ends[path] for path in done}
        waiting = [path for path in waiting if path not in names]
    return names


def _printable(parts: Sequence[str]) -> str:
    return "/".join(parts).encode("utf-8", "backslashreplace").decode()


def named(rows: Iterable[RawRow], name: str, unique: str) -> Iterable[RawRow]:
    """Return rows whose place begins with the unique name of their file, not with its name."""
    if name == unique:
        return rows
    return (replace(row, where=unique + row.where.removeprefix(name)) for row in rows)


class OriginWriter:
    """Writes the entry of each row of the keys that have several. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetWriter(path, SCHEMA)
        self._hash = hashlib.sha256()

    def __enter__(self) -> "OriginWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def version(self) -> str:
        return self._hash.hexdigest()[:20]

    def add(self, key: str, table: Path, files: Mapping[Path, DataFile], names: Names) -> None:
        """Add the rows of a table that has the files of a key."""
        entry_of = {names[path]: file.entry for path, file in files.items()}
        longest_first = sorted(entry_of, key=len, reverse=True)
        place = re.compile("|".join(map(re.escape, longest_first)))
        with pq.ParquetFile(table) as file:
            for batch in file.iter_batches(columns=["id", "source"]):
                ids, sources = (column.to_pylist() for column in batch.columns)
                entries = [entry_of[_matched(place, source)] for source in sources]
                columns = [[key] * len(ids), ids, entries]
                arrays = [pa.array(column, pa.string()) for column in columns]
                self._file.write_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
                self._hash.update("\n".join(map("\t".join, zip(*columns, strict=True))).encode())


def _matched(place: re.Pattern[str], source: str) -> str:
    found = place.match(source)
    assert found is not None, f"{source} names none of the files that were read"
    return found.group()


class Origins:
    """The entries of the trained keys, and the number of each row's entry.

    `entries` are (key, name), by key and in the order of finetune.yaml. `path` is the table of
    raw_dataset, None if it has none. Raises DataError if the table is of other entries.
    """

    def __init__(self, data: DataSettings, path: Path | None) -> None:
        self.entries = [(key, one.name) for key in MIXED for one in data.sources(key)]
        firsts = [(key, number) for number, (key, _) in enumerate(self.entries)]
        self._number = dict(reversed(firsts))
        self._rows: dict[str, tuple[npt.NDArray[Any], Numbers]] = {}
        for key in several(data):
            names = [one.name for one in data.sources(key)]
            table = pq.read_table(path, filters=[("key", "=", key)]) if path else None
            entries = pa.chunked_array([], pa.string()) if table is None else table["entry"]
            numbers = pc.index_in(entries, value_set=pa.array(names))
            if table is None or numbers.null_count:
                raise DataError(
                    where=f"data.{key}",
                    found="raw_dataset was made with other entries",
                    expected=f"rows of {', '.join(names)}",
                    fix="make it again: ft run --asset raw_dataset",
                )
            ids = np.asarray(table["id"].to_pylist(), dtype=str)
            self._rows[key] = ids, numbers.to_numpy() + self._number[key]

    def of(self, key: str, ids: Sequence[str]) -> Numbers:
        """Return the numbers of the entries of rows, or of parts of rows.

        Raises DataError for a row that raw_dataset does not have.
        """
        if key not in self._rows:
            return np.full(len(ids), self._number[key], np.int64)
        known, numbers = self._rows[key]  # sorted by id
        own = np.asarray(list(map(raw_id, ids)), dtype=str)
        at = np.searchsorted(known, own)
        has = at < len(known)
        has[has] = known[at[has]] == own[has]
        if not has.all():
            raise DataError(
                where="chat_dataset",
                found=f"has row {own[~has][0]}, which raw_dataset does not have",
                expected="the rows of today's raw_dataset, of which each has an entry of "
                f"data.{key}",
                fix="make it again: ft run --asset chat_dataset",
            )
        return numbers[at]


def origins_of(raw: Path) -> Path | None:
    """Return the table of a raw dataset with the entry of each row, None if it has none."""
    path = raw / f"{PART}.parquet"
    return path if path.exists() else None


def raw_id(identity: str) -> str:
    """Return the id that raw_dataset has for a row, a part of it, or a copy."""
    return identity.partition(".")[0]


def several(data: DataSettings) -> list[str]:
    """Return the trained keys with several entries."""
    return [key for key in MIXED if len(data.paths(key)) > 1]
