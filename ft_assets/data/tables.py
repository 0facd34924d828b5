"""Rows as parquet files, written and read in batches: no room holds a whole data set. And the version of a set of rows.

A row is a dict (canonical.py); what is not flat in it is kept as JSON text: the calls of a turn, the tools of a
conversation. Optional keys that a row does not have are absent, never None.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TURN = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("train", pa.bool_()),  # False: an answer that is context only
        ("tool_calls", pa.string()),  # JSON
        ("tool_call_id", pa.string()),
        ("name", pa.string()),
    ]
)
ROW = [
    ("id", pa.string()),
    ("group", pa.string()),  # what must stay on one side of the split
    ("stratum", pa.string()),  # the value of data.stratify's field
    ("messages", pa.list_(TURN)),
    ("tools", pa.string()),  # JSON
]
DIGEST = [("digest", pa.string())]  # of all that the row says; what versions are made of
IDS = pa.list_(pa.int32())
CONVERSATION = pa.schema([*ROW, ("source", pa.string()), *DIGEST])
PREFERENCE = pa.schema(
    [*ROW, ("chosen", pa.string()), ("rejected", pa.string()), ("source", pa.string()), *DIGEST]
)
TOKENIZED = pa.schema(
    [
        *ROW,
        (
            "judged",
            pa.bool_(),
        ),  # a whole conversation that ends in an answer: only such a row can be held out
        ("input_ids", IDS),
        ("supervised", pa.list_(pa.bool_())),
        *DIGEST,
    ]
)
TOKENIZED_PREFERENCE = pa.schema(
    [*ROW, ("prompt_ids", IDS), ("chosen_ids", IDS), ("rejected_ids", IDS), *DIGEST]
)
NEAR_DUPLICATE = pa.schema(
    [
        ("kind", pa.string()),
        ("side", pa.string()),
        ("id", pa.string()),
        ("of", pa.string()),
        ("similarity", pa.float64()),
    ]
)
REJECTED = pa.schema([("where", pa.string()), ("problem", pa.string()), ("row", pa.string())])
BATCH = 1000
MODULUS = 2**128


class Version:
    """The version of a set of rows: the sum of their digests, so that neither order nor batches count.

    Equal sets have equal versions; that others have not holds by accident of 128 bits, not against an attacker
    (Bellare & Micciancio 1997, AdHash).
    """

    def __init__(self) -> None:
        self.total, self.rows = 0, 0

    def add(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self.total = (self.total + int(digest, 16)) % MODULUS
            self.rows += 1

    def __str__(self) -> str:
        return hashlib.sha256(f"{self.rows}:{self.total}".encode()).hexdigest()[:20]


class TableWriter:
    """Writes rows to a parquet file in batches. Use as a context; `rows` and `version` say what was written."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.schema, self.rows = schema, 0
        self._file, self._buffer, self._version = pq.ParquetWriter(path, schema), [], Version()

    def __enter__(self) -> "TableWriter":
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
        """The version of the rows written so far, of a schema with digests."""
        self._flush()
        return str(self._version)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; keys outside the schema are left out, and so is nothing else."""
        self._buffer.append(_stored(row, self.schema))
        self.rows += 1
        if len(self._buffer) >= BATCH:
            self._flush()

    def copy(self, batch: pa.RecordBatch) -> None:
        """Add rows of a table of the same schema as they are."""
        self._flush()
        self._append(batch)
        self.rows += batch.num_rows

    def _flush(self) -> None:
        if self._buffer:
            batch, self._buffer = pa.RecordBatch.from_pylist(self._buffer, schema=self.schema), []
            self._append(batch)

    def _append(self, batch: pa.RecordBatch) -> None:
        self._file.write_batch(batch)
        if "digest" in self.schema.names:
            self._version.add(batch.column("digest").to_pylist())


class Table(Sequence[dict[str, Any]]):
    """The rows of a parquet file, read in batches each time they are iterated."""

    def __init__(self, path: Path, columns: list[str] | None = None) -> None:
        self.path, self.columns = path, columns

    def __len__(self) -> int:
        return pq.read_metadata(self.path).num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches():
            yield from rows_of(batch)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("a table is iterated, not indexed; read_table() returns a list")

    def batches(self) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(batch_size=BATCH, columns=self.columns)

    def version(self) -> str:
        """Return the version of the rows, from their digests."""
        version = Version()
        for batch in Table(self.path, ["digest"]).batches():
            version.add(batch.column(0).to_pylist())
        return str(version)


def rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch as dicts."""
    return [_decoded(row) for row in batch.to_pylist()]


def write_table(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> str:
    """Write rows as a parquet file; columns outside the schema are left out. Returns their version."""
    with TableWriter(path, schema) as table:
        for row in rows:
            table.write(row)
        return table.version


def read_table(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read a parquet file, or its first rows, as a list of rows: for what is small or must be held whole."""
    rows: list[dict[str, Any]] = []
    for batch in Table(path).batches():
        rows += rows_of(batch if limit is None else batch.slice(0, limit - len(rows)))
        if limit is not None and len(rows) >= limit:
            break
    return rows


def write_sorted(
    path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema, scratch: Path
) -> tuple[int, int, str]:
    """Write rows sorted by id, of each id the first, so that the order of files changes nothing.

    Returns (rows, doubles left out, version). Sorts more rows than fit in memory: they lie in a memory-mapped Arrow file
    in the folder `scratch` meanwhile, and only ids and positions are held.
    """
    import numpy as np
    from datasets import Dataset

    unsorted = scratch / f"{path.stem}.arrow"
    with pa.OSFile(str(unsorted), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for batch in _batched(rows):
            stream.write_batch(
                pa.RecordBatch.from_pylist([_stored(row, schema) for row in batch], schema=schema)
            )
    stored = Dataset.from_file(str(unsorted))
    ids = np.asarray(stored.data.column("id").to_pylist(), dtype=str)
    order = np.argsort(ids, kind="stable")  # of doubles the first stays first
    kept = order[np.append(True, ids[order][1:] != ids[order][:-1])] if len(ids) else order
    with TableWriter(path, schema) as table:
        for start in range(0, len(kept), BATCH):
            chunk: Any = stored.select(
                kept[start : start + BATCH], keep_in_memory=True
            ).with_format("arrow")[:]
            table.copy(chunk.cast(schema).combine_chunks().to_batches()[0])
        version = table.version
    del stored
    unsorted.unlink()
    return len(kept), len(ids) - len(kept), version


def select(
    batch: pa.RecordBatch, wanted: Callable[[dict[str, Any]], bool], columns: Sequence[str]
) -> pa.RecordBatch:
    """Return the rows of a batch that are wanted by their values in `columns`, of which the batch may lack some."""
    values = batch.select([name for name in columns if name in batch.schema.names]).to_pylist()
    return batch.filter(pa.array([wanted(row) for row in values], pa.bool_()))


def _batched(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _stored(row: dict[str, Any], schema: pa.Schema) -> dict[str, Any]:
    encoded = _encoded({name: row.get(name) for name in schema.names})
    return {**encoded, "digest": _digest(encoded)} if "digest" in schema.names else encoded


def _digest(encoded: dict[str, Any]) -> str:
    """Return the digest of a row as it is stored: not of the file it came from."""
    said = {
        key: value
        for key, value in encoded.items()
        if key not in ("source", "digest") and value is not None
    }
    return hashlib.sha256(
        json.dumps(said, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()[:32]


def _encoded(row: dict[str, Any]) -> dict[str, Any]:
    if isinstance(row.get("messages"), list):
        row["messages"] = [
            {
                **turn,
                "tool_calls": json.dumps(turn["tool_calls"], sort_keys=True, ensure_ascii=False),
            }
            if turn.get("tool_calls")
            else turn
            for turn in row["messages"]
        ]
    if row.get("tools") is not None:
        row["tools"] = json.dumps(row["tools"], sort_keys=True, ensure_ascii=False)
    return row


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("messages") is not None:
        row["messages"] = [_turn(turn) for turn in row["messages"]]
    for key in ("tools", "stratum"):
        if key in row and row[key] is None:
            del row[key]
    if "tools" in row:
        row["tools"] = json.loads(row["tools"])
    return row


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in turn.items() if value is not None}
    if "tool_calls" in kept:
        kept["tool_calls"] = json.loads(kept["tool_calls"])
    return kept
