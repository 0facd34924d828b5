"""Load the tables of assets that are not the project's, as files.

An asset hands its table over in one of two ways: its latest materialization has the metadata
`path` (or `dagster/uri`) of a data file or a folder of them, or its IO manager loads a table.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.compat.dagster import known_asset
from ft_assets.data.data_files import files_in
from ft_assets.data.file_types import DATA, suffixes
from ft_assets.data.remote_files import fetched
from ft_assets.data.upstream import folder_of
from ft_assets.errors import DataError, FtError

PATHS = ("path", "dagster/uri", "uri")  # metadata, the first that leads to data files
HANDED_OVER = (
    "a table (pandas, polars, Arrow, or a list of rows) that its IO manager loads, or the metadata "
    "`path` of a data file"
)


def load_tables(
    context: dg.AssetExecutionContext, assets: Sequence[str], target: Path
) -> dict[str, list[str]]:
    """Write the files of each asset below `target`, which is made.

    Returns {asset: names of its files}.

    Raises DataError for an asset whose table cannot be read.
    """
    found = dict[str, list[str]]()
    for asset in assets:
        folder = target / folder_of(asset)
        folder.mkdir(parents=True)
        _load(context, asset, folder)
        found[asset] = sorted(path.name for path in folder.iterdir())
    return found


def can_be_loaded(context: dg.AssetExecutionContext, asset: str) -> bool:
    """Return True if the code location makes the asset, or the instance has a path to its files."""
    key = dg.AssetKey(asset.split("/"))
    node = known_asset(context, key)
    if node is not None and node.is_executable:
        return True
    event = context.instance.get_latest_materialization_event(key)
    made = event.asset_materialization if event else None
    return made is not None and any(name in made.metadata for name in PATHS)


def _load(context: dg.AssetExecutionContext, asset: str, folder: Path) -> None:
    key = dg.AssetKey(asset.split("/"))
    where = f"finetune.yaml: {{asset: {asset}}}"
    node = known_asset(context, key)
    if node is None or not node.is_partitioned:
        _write(context, key, None, folder, "rows", where)
        return
    partitions = sorted(context.instance.get_materialized_partitions(key))
    if not partitions:
        raise _unreadable(where, "none of its partitions has been materialized")
    for partition in partitions:
        _write(context, key, partition, folder, f"rows-{folder_of(partition)}", where)


def _write(
    context: dg.AssetExecutionContext,
    key: dg.AssetKey,
    partition: str | None,
    folder: Path,
    name: str,
    where: str,
) -> None:
    """Write the table of an asset, or of one of its partitions, as one file or several."""
    downloads = folder.parent.with_name("downloads")
    files = _named_files(context, key, partition, downloads, where)
    if files:
        for number, file in enumerate(files):
            ending = "".join(suffixes(file))
            several = f"-{number:04d}" if len(files) > 1 else ""
            shutil.copyfile(file, folder / f"{name}{several}{ending}")
        return
    try:
        value = context.load_asset_value(key, partition_key=partition)
    except FtError:
        raise
    except Exception as error:  # IO managers have no common error
        event = context.instance.get_latest_materialization_event(key)
        if event is None:
            raise _unreadable(where, "has not been materialized") from None
        reason = " ".join(str(error).split())[:200]
        raise _unreadable(where, f"cannot be loaded: {type(error).__name__}: {reason}") from None
    _write_table(value, folder / name, where)


def _named_files(
    context: dg.AssetExecutionContext,
    key: dg.AssetKey,
    partition: str | None,
    downloads: Path,
    where: str,
) -> list[Path]:
    """Return the data files that the metadata of the latest materialization leads to."""
    chosen = dg.AssetRecordsFilter(
        asset_key=key, asset_partitions=[partition] if partition is not None else None
    )
    records = context.instance.fetch_materializations(chosen, limit=1).records
    event = records[0].asset_materialization if records else None
    for name in PATHS:
        value = event.metadata.get(name) if event else None
        text = str(value.value) if value is not None else ""
        if "://" in text and suffixes(Path(text))[0] in DATA:
            return fetched(text, where, downloads)
        path = Path(text)
        if text and path.is_absolute():
            if path.is_dir():
                return sorted(files_in(path))
            if suffixes(path)[0] in DATA:
                if not path.is_file():
                    raise _unreadable(where, f"its metadata {name} is {path}, which is not there")
                return [path]
    return []


def _write_table(value: Any, target: Path, where: str) -> None:
    """Write a table of any library, without what names the library's version."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(value, str | Path):
        path = Path(value)
        if not path.is_file() or suffixes(path)[0] not in DATA:
            raise _unreadable(where, f"is the path {value}, which is no data file here")
        shutil.copyfile(path, target.with_name(target.name + "".join(suffixes(path))))
        return
    try:
        if isinstance(value, list) and all(isinstance(row, dict) for row in value):
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in value]
            target.with_name(f"{target.name}.jsonl").write_text("".join(lines), encoding="utf-8")
            return
        if type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "columns"):
            table = pa.Table.from_pandas(value, preserve_index=False)
        elif hasattr(value, "__arrow_c_stream__"):  # polars, Arrow, DuckDB
            table = pa.table(value)
        else:
            raise _unreadable(where, f"is a {type(value).__name__}, which is no table")
        pq.write_table(
            table.replace_schema_metadata(None), target.with_name(f"{target.name}.parquet")
        )
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise _unreadable(where, f"cannot be written as a table: {error}") from None


def _unreadable(where: str, found: str) -> DataError:
    return DataError(
        where=where,
        found=found,
        expected=HANDED_OVER,
        fix="materialize it first, or have it return one of these (docs/dagster.md)",
    )
