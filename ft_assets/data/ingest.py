"""Raw rows -> canonical rows in a table, in one pass: each is valid, a double, or rejected with its reason and its text."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ft_assets.data.canonical import digest, normalise
from ft_assets.data.file_formats import RawRow
from ft_assets.data.row_formats import RowProblem, conversation_turns, renamed
from ft_assets.data.tables import TableWriter, write_sorted
from ft_assets.errors import DataError

SHOWN = 2000  # characters of a rejected row that are kept
Form = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class Ingested:
    """The counts of one source, the first rejected rows, and the version of the rows that are left."""

    rows: int
    duplicates: int
    rejected: int
    first: list[str]
    version: str

    @property
    def total(self) -> int:
        return self.rows + self.duplicates + self.rejected

    def metrics(self, name: str) -> dict[str, Any]:
        return {
            f"{name}_rows": self.rows,
            f"{name}_duplicates": self.duplicates,
            f"{name}_rejected": self.rejected,
        }


class Ingest:
    """Writes the valid rows of one source after the other, and all rejected ones to one table."""

    def __init__(self, output: Path, scratch: Path, rejected: TableWriter) -> None:
        self.output, self.scratch, self.rejected = output, scratch, rejected

    def source(
        self,
        name: str,
        rows: Iterable[RawRow],
        form: Form,
        schema: pa.Schema,
        columns: Mapping[str, str] | None = None,
        stratum: str | None = None,
    ) -> Ingested:
        """Write `<name>.parquet`, sorted by id so that file order changes nothing; exact doubles are dropped and counted.

        `columns` are the user's names for ours, {"prompt": "text"}; `stratum` is the field whose value a row is stratified by.
        """
        before, first = self.rejected.rows, []

        def valid() -> Iterator[dict[str, Any]]:
            for row in rows:
                try:
                    yield _canonical(row, form, dict(columns or {}), stratum)
                except RowProblem as problem:
                    if len(first) < 5:
                        first.append(f"{row.where}: {problem}")
                    text = (
                        json.dumps(row.value, ensure_ascii=False, default=str)[:SHOWN]
                        if row.value is not None
                        else ""
                    )
                    text = text.encode("utf-8", "replace").decode()
                    self.rejected.write({"where": row.where, "problem": str(problem), "row": text})

        kept, doubles, version = write_sorted(
            self.output / f"{name}.parquet", valid(), schema, self.scratch
        )
        return Ingested(kept, doubles, self.rejected.rows - before, first, version)


def _canonical(
    row: RawRow, form: Form, columns: dict[str, str], stratum: str | None
) -> dict[str, Any]:
    if row.value is None:
        raise RowProblem(row.problem or "cannot be read")
    canonical = {
        **form(renamed(row.value, columns) if columns else row.value),
        "source": row.where.rsplit(":", 1)[0].rsplit("[", 1)[0],
    }
    if stratum is not None:
        value = row.value.get(stratum)
        if value is None or isinstance(value, dict | list):
            raise RowProblem(
                f"{stratum}: is {'missing' if value is None else 'not a plain value'}; data.stratify.field names it"
            )
        canonical["stratum"] = str(value)
    return canonical


def target(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a row of an evaluation file that must not be trained on: a conversation's turns, else all texts of the row."""
    try:
        said = [
            str(turn["content"])
            for turn in conversation_turns(raw)
            if isinstance(turn, dict) and turn.get("role") == "user"
        ]
    except RowProblem:
        said = [value for value in raw.values() if isinstance(value, str)]
    text = "\n".join(said)
    if not normalise(text):
        raise RowProblem(f"has no text; it has the keys {', '.join(sorted(raw)) or '(none)'}")
    messages = [{"role": "user", "content": text}]
    identity = hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode()).hexdigest()[
        :16
    ]
    return {"id": identity, "messages": messages, "group": digest("prompt", normalise(said[0]))}


def worst(metrics: Mapping[str, Any]) -> tuple[str, int, int]:
    """Return (source, rejected rows, all rows) of the source of an artifact with the largest share of rejected rows."""
    names = [key.removesuffix("_duplicates") for key in metrics if key.endswith("_duplicates")]
    counted = [
        (
            name,
            metrics[f"{name}_rejected"],
            sum(metrics[f"{name}_{kind}"] for kind in ("rows", "duplicates", "rejected")),
        )
        for name in names
    ]
    return max(counted, key=lambda entry: entry[1] / entry[2] if entry[2] else 0.0)


def require_valid(metrics: Mapping[str, Any], most: float, asset: str) -> None:
    """Raise DataError if more than the share `most` of any source was rejected: what is left may be a skewed rest."""
    name, rejected, total = worst(metrics)
    if total and rejected / total > most:
        raise DataError(
            where=f"{asset}: {name}",
            found=f"{rejected} of {total} rows cannot be used, first {metrics['first_rejected']}",
            expected=f"at most {most:.1%} (data.max_invalid)",
            fix=f"correct the rows (info/rejected.parquet of {asset} has them all), or raise data.max_invalid to leave them out",
        )
