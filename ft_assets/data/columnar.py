"""Read the rows of Parquet and Arrow files in batches.

Parquet is read by row groups, Arrow from a memory map. A struct has the fields of all rows in the
table's schema: those that a row does not have are null, and are left out of its objects again.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ft_assets.errors import DataError
from ft_assets.rows.types import RawFields

BATCH = 1000  # rows that are Python objects at the same time
OLD_FEATHER = b"FEA1"
ARROW_FILE = b"ARROW1"


def table_rows(path: Path, kind: str) -> Iterator[RawFields]:
    """Yield the rows of a .parquet, .arrow or .feather file.

    Raises DataError if the file cannot be read.
    """
    batches = _parquet(path) if kind == ".parquet" else _arrow(path)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)  # a damaged Arrow file would be read outside its buffers
            values = _plain(batch)
        # OverflowError, ValueError: dates that Python does not have. UnicodeDecodeError, a
        # ValueError: strings that are not text.
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            OverflowError,
            MemoryError,
            RecursionError,
        ) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise DataError(
                where=str(path),
                found=f"cannot be read ({reason})",
                expected=f"a {kind} file",
                fix="write it again",
            ) from None
        yield from values


def _plain(batch: pa.RecordBatch) -> list[RawFields]:
    """Return the rows of a batch as JSON has them: no field of an object is null by the schema."""
    rows = batch.to_pylist()
    for field in batch.schema:
        if (plain := _plain_of(field.type)) is not None:
            for row in rows:
                row[field.name] = plain(row[field.name])
    return rows


def _plain_of(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return the function that makes a value plain, or None if all values of the type are."""
    types = pa.types
    if types.is_struct(kind):
        parts = {field.name: _plain_of(field.type) for field in kind}

        def plain_struct(value: Any) -> Any:
            if value is None:
                return None
            return {
                key: part if (plain := parts[key]) is None else plain(part)
                for key, part in value.items()
                if part is not None
            }

        return plain_struct
    if types.is_map(kind):  # a list of pairs in Python
        item = _plain_of(kind.item_type) or (lambda value: value)
        return lambda value: None if value is None else {key: item(part) for key, part in value}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _plain_of(kind.value_type)
        if inner is not None:
            return lambda value: None if value is None else [inner(part) for part in value]
    return None


def _sliced(
    path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise DataError(
            where=str(path),
            found=f"has the column {repeated[0]!r} more than once",
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
    if magic.startswith(OLD_FEATHER):  # can only be read as a whole
        from pyarrow import feather  # a tenth of a second, of every command

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
        else:  # datasets writes the stream format
            stream = pa.ipc.open_stream(source)
            yield from _sliced(path, stream.schema, iter(stream))
