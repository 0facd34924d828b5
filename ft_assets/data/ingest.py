"""Write raw rows as canonical rows of a table, in one pass.

Each row is valid, a duplicate, or rejected; a rejected row is stored with its reason and its text.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ft_assets.data.annotators import Votes
from ft_assets.data.audit import Audit
from ft_assets.data.canonical import context_key
from ft_assets.data.raw_row import RawRow
from ft_assets.data.tables import Layout, RowT, TableWriter, write_sorted
from ft_assets.data.units import normalise
from ft_assets.errors import DataError
from ft_assets.rows.cells import plain
from ft_assets.rows.row_formats import conversation_turns, renamed
from ft_assets.rows.types import DataRow, RawFields, RejectedRow
from ft_assets.rows.values import LeftOut, RowProblem

SHOWN = 2000  # characters of a rejected row that are kept
UNREAD = "_unread_columns"  # the end of the metric's name
FIRST = 5  # rejected rows of a source that the metrics show
Canonical = Callable[[RawFields], DataRow]


@dataclass
class Ingested:
    """The counts of one source, its first rejected rows, and the version of its valid rows."""

    rows: int
    duplicates: int
    rejected: int
    first: list[str]
    version: str
    joined: int = 0  # rows with user turns that were joined
    opened: int = 0  # rows that the assistant opens
    ties: int = 0  # rows whose answers are equally good
    unanswered: int = 0  # messages of trees without an answer
    unpaired: int = 0  # labelled answers without a partner, left out
    unlabelled: int = 0  # answers with an empty label
    labels: int = 0  # labelled answers that are rows
    disputed: int = 0  # pairs on which annotators disagree, left out
    unread: str = ""  # text columns that are not read, with their numbers of rows

    @property
    def total(self) -> int:
        return self.rows + self.duplicates + self.rejected

    def metrics(self, name: str) -> dict[str, int | str]:
        return {
            f"{name}_rows": self.rows,
            f"{name}_duplicates": self.duplicates,
            f"{name}_rejected": self.rejected,
            **({f"{name}_with_joined_turns": self.joined} if self.joined else {}),
            **({f"{name}_opened_by_assistant": self.opened} if self.opened else {}),
            **({f"{name}_ties": self.ties} if self.ties else {}),
            **({f"{name}_unanswered": self.unanswered} if self.unanswered else {}),
            **({f"{name}_unpaired": self.unpaired} if self.unpaired else {}),
            **({f"{name}_unlabelled": self.unlabelled} if self.unlabelled else {}),
            **({f"{name}_labels": self.labels} if self.labels else {}),
            **({f"{name}_disputed": self.disputed} if self.disputed else {}),
            **({f"{name}{UNREAD}": self.unread} if self.unread else {}),
        }


class Ingest:
    """Writes the valid rows of one source after the other, and all rejected rows to one table."""

    def __init__(self, output: Path, scratch: Path, rejected: TableWriter[RejectedRow]) -> None:
        self.output = output
        self.scratch = scratch
        self.rejected = rejected

    def source(
        self,
        name: str,
        rows: Iterable[RawRow],
        form: Canonical,
        layout: Layout[RowT],
        columns: Mapping[str, str] | None = None,
        stratum: str | None = None,
        min_agreement: float = 0.5,
        audit: Audit | None = None,
    ) -> Ingested:
        """Write `<name>.parquet`, sorted by id so that the order of files changes nothing.

        Exact duplicates are counted and filtered. `columns` are the user's names for our columns,
        {"prompt": "text"}. `stratum` is the field by whose value rows are stratified. Ties, and
        pairs on which too few annotators agree, are left out and counted apart. `audit` counts what
        is not read. Raises DataError if the columns of the source are unclear.
        """
        before = self.rejected.rows
        first: list[str] = []
        adapted: Counter[str] = Counter()
        votes = Votes()
        aside = 0

        def valid() -> Iterator[RowT]:
            nonlocal aside
            for row in rows:
                try:
                    canonical = _canonical(row, form, dict(columns or {}), stratum, audit)
                    adapted.update(joined=canonical.get("joined", 0) > 0, opened=_opened(canonical))
                    adapted["labels"] += "" in (canonical.get("chosen"), canonical.get("rejected"))
                    if "answers" in canonical:
                        votes.add(canonical)
                    yield cast(RowT, canonical)
                except RowProblem as problem:
                    if isinstance(problem, LeftOut):
                        adapted[problem.count] += 1
                        aside += 1
                    elif len(first) < FIRST:
                        first.append(f"{row.named}: {problem}")
                    kind = problem.count if isinstance(problem, LeftOut) else "invalid"
                    text = _row_text(row)
                    self.rejected.write(
                        {"where": row.named, "problem": str(problem), "row": text, "kind": kind}
                    )

        lost: dict[str, str] = {}
        written = write_sorted(
            self.output / f"{name}.parquet",
            valid(),
            layout,
            self.scratch,
            lambda: lost.update(votes.lost(min_agreement)) or lost,
        )
        rejected = self.rejected.rows - before - aside
        for identity, where in written.left_out.items():
            problem = lost[identity]
            self.rejected.write({"where": where, "problem": problem, "row": "", "kind": "disputed"})
        done = Ingested(
            written.rows,
            written.duplicates,
            rejected,
            first,
            written.version,
            disputed=adapted.pop("disputed", 0) + len(written.left_out),
            **cast(Mapping[str, Any], adapted),
        )
        if aside and not written.rows and not rejected:
            raise DataError(
                where=name,
                found=f"none of {aside} rows can be used, and none is wrong: "
                + ", ".join(f"{kind} {count}" for kind, count in adapted.items() if count),
                expected="at least one row to train on",
                fix="add rows, or remove the files from finetune.yaml",
            )
        if audit is not None:
            audit.require_no_echoes()
            done.unread = audit.columns.described()
        return done


def _opened(row: DataRow) -> bool:
    speakers = (turn["role"] for turn in row["messages"] if turn["role"] != "system")
    return next(speakers, None) == "assistant"


def _row_text(row: RawRow) -> str:
    if row.value is None:
        return ""
    text = json.dumps(row.value, ensure_ascii=False, default=str)[:SHOWN]
    return text.encode("utf-8", "replace").decode()


def _canonical(
    row: RawRow,
    form: Canonical,
    columns: dict[str, str],
    stratum: str | None,
    audit: Audit | None,
) -> DataRow:
    """Return the canonical row, with its file and line as `source`. Raises RowProblem."""
    if row.left_out:
        raise LeftOut(row.problem or "", row.left_out)
    if row.value is None:
        raise RowProblem(row.problem or "cannot be read")
    value = plain(renamed(row.value, columns) if columns else row.value)
    if audit is not None:
        audit.require_clear(row.where, value)
    canonical: Any = form(value)
    if audit is not None:
        audit.add(row.where, value, canonical)
    canonical["source"] = row.named
    if stratum is not None:
        value = row.value.get(stratum)
        if value is None or isinstance(value, dict | list):
            found = "missing" if value is None else "not a plain value"
            raise RowProblem(f"{stratum}: is {found}; data.stratify.field names it")
        canonical["stratum"] = str(value)
    return canonical


def target(raw: RawFields) -> DataRow:
    """Return the canonical form of a row of an evaluation file that must not be trained on.

    Its text is the user turns of a conversation, else all texts of the row. Raises RowProblem.
    """
    texts = _target_texts(plain(raw))
    text = "\n".join(texts)
    if not normalise(text):
        raise RowProblem(f"has no text; it has the keys {', '.join(sorted(raw)) or '(none)'}")
    content = json.dumps(raw, sort_keys=True, default=str)
    return {
        "id": hashlib.sha256(content.encode()).hexdigest()[:16],
        "messages": [{"role": "user", "content": text}],
        "group": context_key([{"role": "user", "content": texts[0]}], []),
    }


def _target_texts(raw: RawFields) -> list[str]:
    try:
        return [
            str(turn["content"])
            for turn in conversation_turns(raw)
            if isinstance(turn, dict) and turn.get("role") == "user"
        ]
    except RowProblem:
        return [value for value in raw.values() if isinstance(value, str)]


def worst(metrics: Mapping[str, Any]) -> tuple[str, int, int]:
    """Return the source of an artifact with the largest share of rejected rows.

    The result is (source, its rejected rows, all its rows).
    """
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
    """Raise DataError if more than the share `most` of any source was rejected.

    The valid rows may then be a skewed sample.
    """
    name, rejected, total = worst(metrics)
    if total and rejected / total > most:
        raise DataError(
            where=f"{asset}: {name}",
            found=f"{rejected} of {total} rows cannot be used, first {metrics['first_rejected']}",
            expected=f"at most {most:.1%} (data.max_invalid)",
            fix=f"correct the rows (info/rejected.parquet of {asset} has them all), "
            "or raise data.max_invalid to train without them",
        )
