"""Read and write tables of rows as Parquet files, in batches.

No module has to load a whole data set. A row is a TypedDict (rows.py). Values that are not flat
are stored as JSON text: the calls of a turn, the tools of a conversation. The module also computes
the version of a set of rows.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast, overload

import pyarrow as pa
import pyarrow.parquet as pq

from ft_assets.rows.types import (
    AuditRow,
    ConversationRow,
    CopyRow,
    JudgedRow,
    Message,
    OwnAnswerRow,
    PairRow,
    PreferenceRow,
    RejectedRow,
    TokenizedRow,
)

BATCH = 1000  # rows that are Python objects at the same time
MODULUS = 2**128

# Columns that no version counts: where a row came from, and what the base model decides.
UNCOUNTED = ("source", "expected", "decoded", "digest")

RowT = TypeVar("RowT", bound=Mapping[str, object])
# A row as Arrow holds it: every column of the schema, None where the row has no value, JSON texts.
ArrowRow = dict[str, Any]


@dataclass(frozen=True)
class Layout(Generic[RowT]):
    """The Parquet schema of a table whose rows have the type `row`."""

    row: type[RowT]
    schema: pa.Schema


TURN = [
    ("role", pa.string()),
    ("content", pa.string()),
    ("train", pa.bool_()),
    ("tool_calls", pa.string()),  # JSON
    ("tool_call_id", pa.string()),
    ("name", pa.string()),
]


def _data_columns(turn: list[tuple[str, pa.DataType]]) -> list[tuple[str, pa.DataType]]:
    return [
        ("id", pa.string()),
        ("group", pa.string()),
        ("stratum", pa.string()),
        ("messages", pa.list_(pa.struct(turn))),
        ("tools", pa.string()),  # JSON
    ]


DATA_COLUMNS = _data_columns(TURN)
# Only the raw tables have it: chat_dataset proves that the template takes the reasoning.
REASONED = [("reasoned", pa.bool_())]
RAW_COLUMNS = _data_columns([*TURN, *REASONED])
OPTIONS = [("options", pa.list_(pa.string()))]
SOURCE = [("source", pa.string())]
DIGEST = [("digest", pa.string())]  # versions are made of it
IDS = pa.list_(pa.int32())

CONVERSATION = Layout(ConversationRow, pa.schema([*RAW_COLUMNS, *OPTIONS, *SOURCE, *DIGEST]))
PREFERENCE = Layout(
    PreferenceRow,
    pa.schema(
        [
            *RAW_COLUMNS,
            ("chosen", pa.string()),
            ("rejected", pa.string()),
            *REASONED,
            *SOURCE,
            *DIGEST,
        ]
    ),
)
TOKENIZED = Layout(
    TokenizedRow,
    pa.schema(
        [
            *DATA_COLUMNS,
            *OPTIONS,
            ("judged", pa.bool_()),
            ("input_ids", IDS),
            ("supervised", pa.list_(pa.bool_())),
            ("expected", pa.string()),
            ("decoded", pa.string()),
            *DIGEST,
        ]
    ),
)
JUDGED = Layout(
    JudgedRow, TOKENIZED.schema.insert(len(DATA_COLUMNS), pa.field("cluster", pa.string()))
)
TOKENIZED_PREFERENCE = Layout(
    PairRow,
    pa.schema(
        [
            *DATA_COLUMNS,
            ("chosen", pa.string()),
            ("rejected", pa.string()),
            ("prompt_ids", IDS),
            ("chosen_ids", IDS),
            ("rejected_ids", IDS),
            *DIGEST,
        ]
    ),
)
AUDIT = Layout(
    AuditRow,
    pa.schema(
        [
            *((name, pa.string()) for name in ("id", "source", "reason")),
            ("score", pa.float64()),
            *((name, pa.string()) for name in ("problem", "text", "answer", "twin", "twin_text")),
        ]
    ),
)
NEAR_DUPLICATE = Layout(
    CopyRow,
    pa.schema(
        [
            ("kind", pa.string()),
            ("side", pa.string()),
            ("id", pa.string()),
            ("source", pa.string()),
            ("of_side", pa.string()),
            ("of", pa.string()),
            ("of_source", pa.string()),
            ("similarity", pa.float64()),
            ("text", pa.string()),
            ("of_text", pa.string()),
        ]
    ),
)
OWN_ANSWER = Layout(
    OwnAnswerRow,
    pa.schema(
        [
            *((name, pa.string()) for name in ("id", "side", "prompt", "reference", "answer")),
            ("times", pa.int64()),
            ("tokens", pa.int64()),
            ("stopped", pa.bool_()),
            ("score", pa.float64()),
            ("right", pa.bool_()),
            ("used", pa.string()),
            ("outcome", pa.string()),
        ]
    ),
)
REJECTED = Layout(
    RejectedRow,
    pa.schema([(name, pa.string()) for name in ("where", "problem", "row", "kind")]),
)


class Version:
    """The version of a set of rows: the sum of their digests, whatever their order and batches.

    Equal sets have equal versions. Distinct sets collide with probability about 2^-128; this is
    not collision-resistant against an attacker (Bellare & Micciancio 1997, AdHash).
    """

    def __init__(self) -> None:
        self.total = 0
        self.rows = 0

    def add(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self.total = (self.total + int(digest, 16)) % MODULUS
            self.rows += 1

    def __str__(self) -> str:
        return hashlib.sha256(f"{self.rows}:{self.total}".encode()).hexdigest()[:20]


class TableWriter(Generic[RowT]):
    """Writes rows to a Parquet file in batches. Use it as a context manager.

    `rows` counts the rows written so far; `version` is their version.
    """

    def __init__(self, path: Path, layout: Layout[RowT]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.schema = layout.schema
        self.rows = 0
        self._file = pq.ParquetWriter(path, layout.schema)
        self._buffer: list[ArrowRow] = []
        self._version = Version()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        self._file.close()

    @property
    def version(self) -> str:
        """The version of the rows written so far. The layout must have digests."""
        self._flush()
        return str(self._version)

    def write(self, row: RowT) -> None:
        """Add a row. Keys that are not in the schema are dropped."""
        self._buffer.append(_stored(row, self.schema))
        self.rows += 1
        if len(self._buffer) >= BATCH:
            self._flush()

    def copy(self, batch: pa.RecordBatch) -> None:
        """Add the rows of a batch. A column that an older table does not have is null."""
        self._flush()
        if batch.schema.names != self.schema.names:
            batch = _completed(batch, self.schema)
        self._append(batch)
        self.rows += batch.num_rows

    def _flush(self) -> None:
        if self._buffer:
            batch = pa.RecordBatch.from_pylist(self._buffer, schema=self.schema)
            self._buffer = []
            self._append(batch)

    def _append(self, batch: pa.RecordBatch) -> None:
        self._file.write_batch(batch)
        if "digest" in self.schema.names:
            self._version.add(batch.column("digest").to_pylist())


class Table(Sequence[RowT]):
    """The rows of a Parquet file, read in batches at each iteration.

    Name the type of the rows: `Table[TokenizedRow](path)`.
    """

    def __init__(self, path: Path, columns: list[str] | None = None) -> None:
        self.path = path
        self.columns = columns

    def __len__(self) -> int:
        return pq.read_metadata(self.path).num_rows

    def __iter__(self) -> Iterator[RowT]:
        for batch in self.batches():
            yield from cast(list[RowT], rows_of(batch))

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("a table is iterated, not indexed; read_table() returns a list")

    def batches(self) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(batch_size=BATCH, columns=self.columns)

    def row_batches(self) -> Iterator[list[RowT]]:
        """Yield the rows in lists of at most BATCH rows."""
        for batch in self.batches():
            yield cast(list[RowT], rows_of(batch))

    def version(self) -> str:
        """Return the version of the rows, from their digests."""
        version = Version()
        for batch in Table(self.path, ["digest"]).batches():
            version.add(batch.column(0).to_pylist())
        return str(version)


def rows_of(batch: pa.RecordBatch) -> list[ArrowRow]:
    """Return the rows of a batch, decoded."""
    return [_decoded(row) for row in batch.to_pylist()]


def write_table(path: Path, rows: Iterable[RowT], layout: Layout[RowT]) -> str:
    """Write rows as a Parquet file and return their version."""
    with TableWriter(path, layout) as table:
        for row in rows:
            table.write(row)
        return table.version


@overload
def read_table(path: Path, limit: int | None = None) -> list[Any]: ...
@overload
def read_table(path: Path, limit: int | None = None, *, row: type[RowT]) -> list[RowT]: ...
def read_table(path: Path, limit: int | None = None, *, row: Any = None) -> list[Any]:
    """Return the rows of a table, or its first `limit` rows, as a list of rows of type `row`.

    Use it for tables that are small or must be in memory as a whole.
    """
    rows: list[ArrowRow] = []
    for batch in Table(path).batches():
        rows += rows_of(batch if limit is None else batch.slice(0, limit - len(rows)))
        if limit is not None and len(rows) >= limit:
            break
    return rows


@dataclass(frozen=True)
class SortedTable:
    """The outcome of `write_sorted`: rows written, duplicates dropped, version of the rows.

    `left_out`: the distinct rows left out, {id: the file and line they came from}.
    """

    rows: int
    duplicates: int
    version: str
    left_out: dict[str, str] = field(default_factory=dict)


def write_sorted(
    path: Path,
    rows: Iterable[RowT],
    layout: Layout[RowT],
    scratch: Path,
    left_out: Callable[[], Iterable[str]] = tuple,
) -> SortedTable:
    """Write rows sorted by id, so that the order of files changes nothing.

    Of several rows with one id the first is kept. More rows than fit in memory can be sorted: they
    are in a memory-mapped Arrow file in the folder `scratch` meanwhile, and only ids and positions
    are in memory. `left_out` returns the ids of rows to leave out, once all rows are read.
    """
    import numpy as np
    from datasets import Dataset

    schema = layout.schema
    unsorted = scratch / f"{path.stem}.arrow"
    with pa.OSFile(str(unsorted), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for batch in _batched(rows):
            stored_rows = [_stored(row, schema) for row in batch]
            stream.write_batch(pa.RecordBatch.from_pylist(stored_rows, schema=schema))
    stored = Dataset.from_file(str(unsorted))
    ids = np.asarray(stored.data.column("id").to_pylist(), dtype=str)
    order = np.argsort(ids, kind="stable")  # of duplicates the first stays first
    kept = order[np.append(True, ids[order][1:] != ids[order][:-1])] if len(ids) else order
    distinct = len(kept)
    out: dict[str, str] = {}
    if unwanted := list(left_out()):
        lost = np.isin(ids[kept], unwanted)
        out = {str(ids[at]): str(stored[int(at)]["source"]) for at in kept[lost]}
        kept = kept[~lost]
    with TableWriter(path, layout) as table:
        for start in range(0, len(kept), BATCH):
            part = stored.select(kept[start : start + BATCH], keep_in_memory=True)
            chunk: Any = part.with_format("arrow")[:]
            table.copy(chunk.cast(schema).combine_chunks().to_batches()[0])
        version = table.version
    del stored
    unsorted.unlink()
    return SortedTable(len(kept), len(ids) - distinct, version, out)


def select(
    batch: pa.RecordBatch, wanted: Callable[[ArrowRow], bool], columns: Sequence[str]
) -> pa.RecordBatch:
    """Return the rows of a batch for which `wanted` is true of their values in `columns`.

    Columns that the batch does not have are skipped.
    """
    values = batch.select([name for name in columns if name in batch.schema.names]).to_pylist()
    return batch.filter(pa.array([wanted(row) for row in values], pa.bool_()))


def with_cluster(batch: pa.RecordBatch, clusters: Mapping[str, str]) -> pa.RecordBatch:
    """Return a batch of JUDGED with the cluster of each row, which its digest covers."""
    names = [clusters[identity] for identity in batch.column("id").to_pylist()]
    digests = [
        hashlib.sha256(f"{digest}:{name}".encode()).hexdigest()[:32]
        for digest, name in zip(batch.column("digest").to_pylist(), names, strict=True)
    ]
    batch = _completed(batch, TOKENIZED.schema)
    columns = {name: batch.column(name) for name in batch.schema.names}
    columns |= {"cluster": pa.array(names, pa.string()), "digest": pa.array(digests, pa.string())}
    return pa.RecordBatch.from_arrays(
        [columns[name] for name in JUDGED.schema.names], schema=JUDGED.schema
    )


def _completed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch with all columns of a schema. A column that it does not have is null."""
    columns = [
        batch.column(field.name)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _batched(rows: Iterable[RowT]) -> Iterator[list[RowT]]:
    batch: list[RowT] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _stored(row: Mapping[str, object], schema: pa.Schema) -> ArrowRow:
    encoded = _encoded({name: row.get(name) for name in schema.names})
    return {**encoded, "digest": _digest(encoded)} if "digest" in schema.names else encoded


def _digest(encoded: ArrowRow) -> str:
    """Return the digest of a stored row, without its UNCOUNTED columns."""
    content = {
        key: value for key, value in encoded.items() if key not in UNCOUNTED and value is not None
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _encoded(row: ArrowRow) -> ArrowRow:
    if isinstance(row.get("messages"), list):
        row["messages"] = [_encoded_turn(turn) for turn in row["messages"]]
    if row.get("tools") is not None:
        row["tools"] = json.dumps(row["tools"], sort_keys=True, ensure_ascii=False)
    return row


def _encoded_turn(turn: Message) -> ArrowRow | Message:
    if not turn.get("tool_calls"):
        return turn
    calls = json.dumps(turn.get("tool_calls"), sort_keys=True, ensure_ascii=False)
    return {**turn, "tool_calls": calls}


def _decoded(row: ArrowRow) -> ArrowRow:
    if row.get("messages") is not None:
        row["messages"] = [_decoded_turn(turn) for turn in row["messages"]]
    for key in ("tools", "stratum", "options", "expected", "decoded", "reasoned"):
        if key in row and row[key] is None:
            del row[key]
    if "tools" in row:
        row["tools"] = json.loads(row["tools"])
    return row


def _decoded_turn(turn: ArrowRow) -> ArrowRow:
    kept = {key: value for key, value in turn.items() if value is not None}
    if "tool_calls" in kept:
        kept["tool_calls"] = json.loads(kept["tool_calls"])
    return kept
