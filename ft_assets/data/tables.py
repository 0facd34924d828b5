"""Rows as parquet files, and the version of a set of rows."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
CONVERSATION = pa.schema([("id", pa.string()), ("messages", MESSAGES), ("source", pa.string()), ("group", pa.string())])
PREFERENCE = pa.schema([*CONVERSATION, ("chosen", pa.string()), ("rejected", pa.string())])
TOKENIZED = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("messages", MESSAGES),
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
    ]
)
TOKENIZED_PREFERENCE = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("messages", MESSAGES),
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
    ]
)
NEAR_DUPLICATE = pa.schema([("side", pa.string()), ("id", pa.string()), ("of", pa.string()), ("similarity", pa.float64())])
REJECTED = pa.schema([("where", pa.string()), ("problem", pa.string())])


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows as a parquet file; columns outside the schema are left out."""
    pq.write_table(pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema), path)


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read a parquet file as rows."""
    return pq.read_table(path).to_pylist()


def rows_version(rows: Iterable[dict[str, Any]]) -> str:
    """Return the hash of rows as a set: order does not count, nor does the file they came from."""
    lines = sorted(
        json.dumps({key: value for key, value in row.items() if key != "source"}, sort_keys=True, ensure_ascii=False) for row in rows
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:20]
