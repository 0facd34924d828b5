"""Rows of Parquet and Arrow files, in batches: Parquet by row groups, Arrow out of a memory map."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from ft_assets.errors import DataError

BATCH = 1000  # rows that are Python objects at once
OLD_FEATHER = b"FEA1"
ARROW_FILE = b"ARROW1"


def table_rows(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .parquet, .arrow or .feather file. Raises DataError for one that cannot be read."""
    batches = _parquet(path) if kind == ".parquet" else _arrow(path)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)  # a damaged Arrow file would be read outside its buffers
            values = batch.to_pylist()
        # OverflowError, ValueError: dates that Python has not; UnicodeDecodeError, a ValueError: strings that are none
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            OverflowError,
            MemoryError,
            RecursionError,
        ) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise DataError(
                where=str(path),
                found=f"cannot be read ({said})",
                expected=f"a {kind} file",
                fix="write it again",
            ) from None
        yield from values


def _sliced(
    path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    doubles = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if doubles:
        raise DataError(
            where=str(path),
            found=f"has the column {doubles[0]!r} more than once",
            expected="distinct column names",
            fix="rename one of them",
        )
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            yield batch.slice(start, BATCH)


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from _sliced(path, file.schema_arrow, file.iter_batches(batch_size=BATCH))


def _arrow(path: Path) -> Iterator[pa.RecordBatch]:
    with path.open("rb") as file:
        magic = file.read(len(ARROW_FILE))
    if magic.startswith(OLD_FEATHER):  # only read whole
        table = feather.read_table(path)
        yield from _sliced(path, table.schema, iter(table.to_batches()))
        return
    with pa.memory_map(str(path)) as source:
        if magic == ARROW_FILE:
            reader = pa.ipc.open_file(source)
            yield from _sliced(
                path,
                reader.schema,
                (reader.get_batch(index) for index in range(reader.num_record_batches)),
            )
        else:  # datasets writes the stream form
            stream = pa.ipc.open_stream(source)
            yield from _sliced(path, stream.schema, iter(stream))
