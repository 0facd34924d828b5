"""Mix the sources of the train side: how often each row is trained, and what each source gives.

Which rows a weight takes depends on the rank of the hash of (seed, id) among the rows of the source
on the train side. So a larger weight adds rows and replaces none, and no other side moves.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as compute
import xxhash
from pydantic import BaseModel, TypeAdapter

from ft_assets import markdown
from ft_assets.config import DataSettings, Source
from ft_assets.data.left_out import question
from ft_assets.data.origins import Numbers, Origins, origins_of, raw_id
from ft_assets.data.tables import Table
from ft_assets.rows.types import ConversationRow, RejectedRow

pc: Any = compute  # its functions are made when it is imported
KEY_OF = {"conversations": "train", "rehearsal": "rehearsal"}  # {table: key of data}
FILE = "sources.json"
COPY = ".x"  # in the id of a repeated row, before its number
Hashes = npt.NDArray[np.uint64]
_NONE = np.array([], np.uint64)


class SourceLine(BaseModel, frozen=True):
    """What became of the rows of an entry of data.train or data.rehearsal.

    `rows` are those of chat_dataset: a conversation whose template gives one sequence a turn counts
    for each. unused: left out by the weight. trained: with repeated rows. available: conversations
    of the train side, each once, of which `asked` are taken; None if an older version counted.
    Tokens are of this base's tokenizer: `tokens` of all rows, `trained_tokens` and `learnt_tokens`
    (in the loss) of an epoch.
    """

    key: str
    path: str
    weight: float | None = None
    asked: int | None = None  # rows: conversations
    rows: int = 0
    heldout: int = 0
    validation: int = 0
    left_out: int = 0
    unused: int = 0
    trained: int = 0
    available: int | None = None
    tokens: int = 0
    trained_tokens: int = 0
    learnt_tokens: int = 0

    @property
    def portion(self) -> str:
        """What finetune.yaml takes of it: `weight 0.5`, `500 rows`, or `all`."""
        if self.asked is not None:
            return f"{self.asked} rows"
        return "all" if self.weight is None else f"weight {self.weight:g}"


_LINES = TypeAdapter(list[SourceLine])


def read_sources(split: Path) -> list[SourceLine]:
    """Return the sources of a written split; [] if an older version wrote it."""
    path = split / "info" / FILE
    return _LINES.validate_json(path.read_bytes()) if path.exists() else []


def source_tokens(data: DataSettings, raw: Path, chat: Path) -> list[SourceLine]:
    """Return the rows and tokens of each source in a chat dataset, before any split."""
    mixing = Mixing(data, Origins(data, origins_of(raw)))
    for table in KEY_OF:
        for batch in Table(chat / f"{table}.parquet", ["id", "input_ids"]).batches():
            mixing.count(table, batch, [None] * batch.num_rows)
    return mixing.lines()


def source_rows(data: DataSettings, raw: Path) -> list[tuple[str, int]]:
    """Return the name of each source with the rows that a raw dataset has of it."""
    origins = Origins(data, origins_of(raw))
    counts = np.zeros(len(origins.entries), np.int64)
    for table, key in KEY_OF.items():
        for batch in Table(raw / f"{table}.parquet", ["id"]).batches():
            numbers = origins.of(key, batch.column("id").to_pylist())
            counts += np.bincount(numbers, minlength=len(counts))
    return [
        (source_name(key, path), int(count))
        for (key, path), count in zip(origins.entries, counts, strict=True)
        if path in [one.name for one in data.sources(key)]
    ]


def source_name(key: str, path: str) -> str:
    """Return the name of an entry in tables, with its key if that is not data.train."""
    return path if key == "train" else f"{path} ({key})"


def shares_table(lines: Sequence[SourceLine]) -> markdown.Table:
    """Return what each source gives to the train side, with its share of the tokens."""
    total = sum(line.trained_tokens for line in lines) or 1
    return markdown.Table(
        [
            "source",
            "taken",
            "rows",
            "held-out",
            "validation",
            "left out",
            "not taken",
            "trained rows",
            "trained tokens",
            "share of them",
            "tokens in the loss",
        ],
        [
            [
                source_name(line.key, line.path),
                line.portion,
                *(f"{count:,}" for count in (line.rows, line.heldout, line.validation)),
                *(f"{count:,}" for count in (line.left_out, line.unused, line.trained)),
                f"{line.trained_tokens:,}",
                f"{line.trained_tokens / total:.1%}",
                f"{line.learnt_tokens:,}",
            ]
            for line in lines
        ],
    )


def expected(data: DataSettings, lines: Sequence[SourceLine]) -> list[SourceLine]:
    """Return the lines of a split as today's weights make them, with the rows of that split.

    The tokens of a source whose weight has changed are its mean length times its rows. [] if the
    entries are others.
    """
    today = {(key, one.name): one for key in KEY_OF.values() for one in data.sources(key)}
    if list(today) != [(line.key, line.path) for line in lines]:
        return []
    return [_expected(today[line.key, line.path], line) for line in lines]


def _expected(source: Source, line: SourceLine) -> SourceLine:
    rows = line.rows - line.heldout - line.validation - line.left_out
    now = line.model_copy(update={"weight": source.weight, "asked": source.rows})
    if now.portion == line.portion or not line.rows:
        return now
    weight = 1.0 if source.weight is None else source.weight
    if source.rows is not None:  # conversations, which have as many sequences as the others
        has = rows if line.available is None else line.available
        weight = min(source.rows, has) / max(has, 1)
    trained = round(weight * rows)
    tokens = round(line.tokens / line.rows * trained)
    return now.model_copy(update={"trained": trained, "trained_tokens": tokens})


def shortages(lines: Sequence[SourceLine]) -> list[str]:
    """Return a sentence for each source that has fewer rows than it is to give."""
    known = [(line, line.trained if line.available is None else line.available) for line in lines]
    return [
        f"{source_name(line.key, line.path)} has {has} of {line.asked} rows"
        for line, has in known
        if line.asked is not None and has < line.asked
    ]


def is_copy(identity: str) -> bool:
    """Return True for the id of a row that stands there again because of its weight."""
    return COPY in identity


class Mixing:
    """Repeats and leaves out rows of the train side as the sources say, and counts all rows.

    Give it the ids of all train rows first (`add`), then the batches.
    """

    def __init__(self, data: DataSettings, origins: Origins) -> None:
        self.origins = origins
        by_path = {(key, one.name): one for key in KEY_OF.values() for one in data.sources(key)}
        self.sources: list[Source] = [by_path[entry] for entry in origins.entries]
        self.unused: dict[str, list[str]] = {table: [] for table in KEY_OF}  # ids
        self._hashes: list[list[Hashes]] = [[] for _ in self.sources]
        self._last: dict[str, str] = {}  # the conversation of the last row of each table
        self._counts = [dict.fromkeys(SourceLine.model_fields, 0) for _ in self.sources]

    @property
    def mixes(self) -> list[str]:
        """The tables of which a source has a weight or a number of rows."""
        keys = [key for key, _ in self.origins.entries]
        mixed = {key for key, one in zip(keys, self.sources, strict=True) if one.mixed}
        return [table for table, key in KEY_OF.items() if key in mixed]

    def add(self, table: str, ids: Sequence[str]) -> None:
        """Note rows of the train side, of which the weights take a share."""
        numbers = self.origins.of(KEY_OF[table], ids)
        for number in np.unique(numbers).tolist():
            if self.sources[number].mixed:
                own = [one for one, at in zip(ids, numbers, strict=True) if at == number]
                self._hashes[number].append(_hashes(self.sources[number], own))

    def settle(self) -> None:
        """Decide, when all rows are added, how often the rows of each source are trained."""
        self._portions = [
            _portion(one, np.unique(np.concatenate([_NONE, *hashes])))
            for one, hashes in zip(self.sources, self._hashes, strict=True)
        ]
        self._hashes.clear()

    def trained(self, table: str, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a batch of the train side that are trained, then their copies."""
        ids = batch.column("id").to_pylist()
        numbers = self.origins.of(KEY_OF[table], ids)
        times = self._times(numbers, ids) if table in self.mixes else np.ones(len(ids), np.int64)
        self.unused[table] += [one for one, count in zip(ids, times, strict=True) if not count]
        self._count("unused", numbers[times == 0])
        self._count("available", numbers[self._begins(table, ids)])
        self._count("trained", numbers, times)
        self._count("trained_tokens", numbers, times * _lengths(batch))
        self._count("learnt_tokens", numbers, times * _supervised(batch))
        for copy in range(1, int(times.max(initial=0)) + 1):
            part = batch.filter(pa.array(times >= copy))
            yield part if copy == 1 else _copied(part, copy)

    def count(self, table: str, batch: pa.RecordBatch, sides: Sequence[str | None]) -> None:
        """Count the rows of a batch of chat_dataset by their side; those on none are left out."""
        numbers = self.origins.of(KEY_OF[table], batch.column("id").to_pylist())
        self._count("rows", numbers)
        self._count("tokens", numbers, _lengths(batch))
        for name in ("heldout", "validation"):
            self._count(name, numbers[np.array([one == name for one in sides], bool)])
        self._count("left_out", numbers[np.array([not one for one in sides], bool)])

    def lines(self) -> list[SourceLine]:
        """Return what became of the rows of each source."""
        return [
            SourceLine(
                **{**counts, "key": key, "path": path, "weight": one.weight, "asked": one.rows}
            )
            for (key, path), one, counts in zip(
                self.origins.entries, self.sources, self._counts, strict=True
            )
        ]

    def write(self, info: Path) -> None:
        """Write the counts."""
        (info / FILE).write_bytes(_LINES.dump_json(self.lines(), indent=1))

    def left_out(self, raw: Mapping[str, Path]) -> Iterator[RejectedRow]:
        """Yield the rows that the weights leave out; the tables `raw` have their places."""
        lines = self.lines()
        for table in self.mixes:
            lost = set(map(raw_id, self.unused[table]))
            for row in Table[ConversationRow](raw[table]) if table in raw and lost else ():
                if row["id"] in lost:
                    line = lines[int(self.origins.of(KEY_OF[table], [row["id"]])[0])]
                    yield {
                        "where": row["source"],
                        "problem": f"data.{line.key} takes {line.portion} of {line.path}",
                        "row": question(row["messages"]),
                        "kind": "mixing",
                    }

    def _begins(self, table: str, ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return which rows begin a conversation: its parts follow each other."""
        own = [raw_id(one) for one in ids]
        before = [self._last.get(table, ""), *own[:-1]]
        self._last[table] = own[-1] if own else before[0]
        return np.array([one != other for one, other in zip(own, before, strict=False)], bool)

    def _times(self, numbers: Numbers, ids: Sequence[str]) -> Numbers:
        """Return how often each row is trained."""
        times = np.ones(len(ids), np.int64)
        for number in np.unique(numbers).tolist():
            one = self.sources[number]
            if one.mixed:
                whole, last = self._portions[number]
                own = np.flatnonzero(numbers == number)
                times[own] = whole
                if last is not None:
                    times[own] += _hashes(one, [ids[at] for at in own.tolist()]) <= last
        return times

    def _count(self, name: str, numbers: Numbers, values: Numbers | None = None) -> None:
        sums: list[float] = np.bincount(numbers, values, len(self.sources)).tolist()
        for number, value in enumerate(sums):
            self._counts[number][name] += int(value)


def _hashes(source: Source, ids: Sequence[str]) -> Hashes:
    """Return the hash of each row, by which it is taken; parts of a row have that of the row."""
    texts = (f"{source.seed or 0}:{raw_id(identity)}".encode() for identity in ids)
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, len(ids))


def _portion(source: Source, hashes: Hashes) -> tuple[int, np.uint64 | None]:
    """Return how often each row is trained, and the last hash of those trained once more.

    `hashes` are those of the source's rows, sorted.
    """
    if source.rows is not None:
        whole, more = 0, min(source.rows, len(hashes))
    else:
        whole = int(source.weight or 0)
        more = round(((source.weight or 0) - whole) * len(hashes))
    return whole, hashes[more - 1] if more else None


def _lengths(batch: pa.RecordBatch) -> Numbers:
    return pc.list_value_length(batch.column("input_ids")).to_numpy().astype(np.int64)


def _supervised(batch: pa.RecordBatch) -> Numbers:
    """Return the number of tokens of each row that are in the loss."""
    lengths = _lengths(batch)
    flat = pc.list_flatten(batch.column("supervised")).to_numpy(zero_copy_only=False)
    sums = np.concatenate([[0], np.cumsum(flat, dtype=np.int64)])
    ends = np.cumsum(lengths)
    return sums[ends] - sums[ends - lengths]


def _copied(batch: pa.RecordBatch, number: int) -> pa.RecordBatch:
    """Return rows as their copies: trained, and judged or shown as an example nowhere."""
    ids = [f"{identity}{COPY}{number}" for identity in batch.column("id").to_pylist()]
    digests = [
        hashlib.sha256(f"{digest}{COPY}{number}".encode()).hexdigest()[:32]
        for digest in batch.column("digest").to_pylist()
    ]
    changed = {
        "id": pa.array(ids, pa.string()),
        "digest": pa.array(digests, pa.string()),
        "judged": pa.array([False] * len(ids), pa.bool_()),
    }
    columns = [
        changed[name] if name in changed else batch.column(name) for name in batch.schema.names
    ]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)
