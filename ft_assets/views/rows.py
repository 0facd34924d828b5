"""Find rows of the data, and tell for each on which side it is or why it is left out.

Tables are read in batches of columns, so that a million rows can be searched. No torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import Project
from ft_assets.data.left_out import VERBS
from ft_assets.data.tables import Table, rows_of
from ft_assets.errors import DataError
from ft_assets.rows.types import PAIRED, AuditReason, AuditRow, CopyRow, Message, RejectedRow
from ft_assets.views.row_places import LEFT_OUT, PLACES, SIDE_NAMES, TABLES, Place

pc: Any = compute  # its functions are made when it is imported
BATCH = 65536  # rows whose columns are read at a time
LINE = 100  # characters of a row in a list
UNSPLIT = "not split yet"
NAMED, REASONS = "any", get_args(AuditReason)  # of the row audit
AUDITED = ("conversations", "rehearsal", "own_rehearsal")


@dataclass(frozen=True)
class Wanted:
    """Which rows are looked for. An empty value excludes none.

    id: the beginning of an id. text: in any turn, answer, problem, or file and line, whatever its
    case. side: one of SIDE_NAMES. index: the number of a row in its table. named: a reason of the
    row audit, or NAMED for any.
    """

    table: str = ""
    id: str = ""
    text: str = ""
    side: str = ""
    index: int | None = None
    named: str = ""


@dataclass(frozen=True)
class Twin:
    """The row that a row repeats: its side, file and line, id, and the beginning of its question.

    relation: what the row does to it, e.g. `is nearly`. similarity: from 0 to 1.
    """

    relation: str
    where: str
    id: str
    text: str
    similarity: float


@dataclass(frozen=True)
class RowLine:
    """A row in a list. `source` is its file and line; `text` its question, or what is left of it.

    reason: the kind of reason why it is left out, "" if it is not. problem: the reason in full.
    named: what the row audit says of it, a sentence each.
    """

    table: str
    index: int
    id: str
    source: str
    side: str
    text: str
    reason: str = ""
    problem: str = ""
    twin: Twin | None = None
    named: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """The rows of one page of a search, as stored, with their lines; `total` is that of all."""

    lines: list[RowLine]
    rows: list[dict[str, Any]]
    total: int


class RowFinder:
    """The rows of a project, with the split of one base model if it is made."""

    def __init__(self, project: Project, store: ArtifactStore, base_model: str) -> None:
        project.base_model(base_model)  # raises ConfigError
        base = store.current("base_model", base_model)
        self.tokenizer = base.path / "tokenizer.json" if base else None
        self.places = {name: place for name, place in PLACES.items() if place.only_if(project)}
        made = {name: store.need(name, None) for name in ("raw_dataset", "raw_preferences")}
        for name in {one for place in self.places.values() for one in place.assets} - made.keys():
            if one := store.current(name, None if name == "raw_text" else base_model):
                made[name] = one
        self.made = {name: store.verified(one).path for name, one in made.items()}
        audited = store.current("row_audit", base_model) if project.audit else None
        self._audit = store.verified(audited).path / "rows.parquet" if audited else None

    @property
    def audited(self) -> bool:
        """Whether there is a row audit of the base model."""
        return self._audit is not None

    def tables(self) -> dict[str, int]:
        """Return the number of rows of each table that has some."""
        counts = {name: len(Table(path)) for name in TABLES if (path := self._path(name))}
        return {name: count for name, count in counts.items() if count}

    def find(self, wanted: Wanted, offset: int = 0, limit: int = 20) -> Found:
        """Return the wanted rows from number `offset` on. Raises DataError for unknown names."""
        for given, known, what in (
            (wanted.table, TABLES, "table"),
            (wanted.side, SIDE_NAMES, "side"),
            (wanted.named, (NAMED, *REASONS), "reason"),
        ):
            if given and given not in known:
                raise DataError(
                    where=f"{what} {given}",
                    found="is not known",
                    expected=f"one of {', '.join(known)}",
                    fix="choose one of these, or leave it out",
                )
        if wanted.named and self._audit is None:
            raise DataError(
                where="row_audit",
                found="has not been made for this base model",
                expected="an audit of the train rows",
                fix="set audit: {} in finetune.yaml, then ft run --until row_audit",
            )
        total = 0
        lines: list[RowLine] = []
        rows: list[dict[str, Any]] = []
        for table in [wanted.table] if wanted.table else TABLES:
            path = self._path(table)
            if path is None:
                continue
            hits = list(self._hits(table, path, wanted))
            begin = min(len(hits), max(0, offset - total))
            shown = hits[begin : begin + limit - len(rows)]
            total += len(hits)
            found = _rows_at(path, shown)
            lines += self._lines(table, shown, found)
            rows += found
        return Found(lines, rows, total)

    def sequences(self, line: RowLine) -> list[dict[str, Any]]:
        """Return the token sequences of a row as they are trained; [] if it has none."""
        place = self.places[line.table]
        folder, found = self.made.get(place.rendered), list[dict[str, Any]]()
        for name in place.tokens if line.id else ():
            path = folder / f"{name}.parquet" if folder else None
            if path and path.exists():
                ours = pc.match_substring_regex(_column(path, "id"), rf"^{line.id}(\.|$)")
                found += _rows_at(path, pc.indices_nonzero(ours).to_pylist())
        return found

    def _path(self, table: str) -> Path | None:
        """Return the file of a table, None if the project has it not, or not yet."""
        place = self.places.get(table)
        folder = self.made.get(place.asset) if place else None
        path = folder / f"{place.file}.parquet" if folder and place else None
        return path if path and path.exists() else None

    def _hits(self, table: str, path: Path, wanted: Wanted) -> Iterator[int]:
        """Yield the numbers of the wanted rows of a table."""
        columns = set(pq.read_schema(path).names) & {"id", *(_TEXTS if wanted.text else ())}
        named = pa.array([], pa.string())
        if wanted.named:
            hits = (
                row["id"]
                for rows in self._named.values()
                for row in rows
                if wanted.named in (NAMED, row["reason"])
            )
            named = pa.array(hits, pa.string())
        sides = self._sides(table) if wanted.side else {}
        start = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, columns=sorted(columns) or [_first(path)]):
                mask = pa.array([True] * batch.num_rows)
                for part in _conditions(batch, self.places[table], wanted, sides, start):
                    mask = pc.and_(mask, part)
                if wanted.named:
                    is_named = table in AUDITED and pc.is_in(batch.column("id"), value_set=named)
                    mask = pc.and_(mask, is_named)
                yield from (start + int(at) for at in pc.indices_nonzero(mask).to_pylist())
                start += batch.num_rows

    def _sides(self, table: str) -> dict[str, pa.Array]:
        """Return the ids of a table's rows on each side; {} before the split."""
        place = self.places[table]
        split = self.made.get(place.split)
        if split is None:
            return {}
        found: dict[str, pa.Array] = {}
        # Equal rows have one id. With a file of held-out rows no other row is held out.
        heldout = self._path("heldout")
        fixed = table == "conversations" and heldout is not None and len(Table(heldout)) > 0
        for name, shown in place.sides.items():
            if fixed and name == "heldout":
                continue
            ids = _column(split / f"{name}.parquet", "id")
            found[shown] = pc.replace_substring_regex(ids, r"\..*$", "")
        return found

    def _lines(
        self, table: str, numbers: Sequence[int], rows: Sequence[dict[str, Any]]
    ) -> list[RowLine]:
        own = pa.array([row.get("id") for row in rows], pa.string())
        sides = {
            name: set(own.filter(pc.is_in(own, value_set=ids)).to_pylist())
            for name, ids in self._sides(table).items()
        }
        return [
            self._line(table, number, row, sides) for number, row in zip(numbers, rows, strict=True)
        ]

    def _line(
        self, table: str, number: int, row: dict[str, Any], sides: dict[str, set[str]]
    ) -> RowLine:
        place = self.places[table]
        if "problem" in row:
            kind, why = row.get("kind") or "invalid", row["problem"]
            return RowLine(
                *(table, number, "", row["where"], LEFT_OUT, _short(row["row"]), kind, why)
            )
        if "outcome" in row:
            return _sampled(table, number, row)
        source, own = row.get("source") or f"sampled for {row['id'][:8]}", row["id"]
        line = (table, number, own, source)  # the first fields of RowLine
        text = _short(question(row["messages"]))
        if place.fixed:
            return RowLine(*line, place.fixed, text)
        twin = self._twins.get((table, own))
        side = next((name for name, ids in sides.items() if own in ids), None)
        if side is not None:
            said = tuple(
                f"{row['reason']}: {row['problem']}"
                for row in (self._named.get(own, ()) if table in AUDITED else ())
            )
            return RowLine(*line, side, text, twin=twin, named=said)
        if (problem := self._refused.get(source)) is not None:
            kind = problem.get("kind") or "template"
            return RowLine(*line, LEFT_OUT, text, kind, problem["problem"])
        if not sides:
            return RowLine(*line, UNSPLIT, text)
        if twin is not None:
            why = f"{twin.relation} {twin.where} (similarity {twin.similarity:.2f})"
            return RowLine(*line, LEFT_OUT, text, self._copies[table, own]["kind"], why, twin)
        changed = (
            f"{place.split} was made before this row came: ft plan shows what a run makes again"
        )
        return RowLine(*line, UNSPLIT, text, problem=changed)

    @cached_property
    def _named(self) -> dict[str, list[AuditRow]]:
        """What the row audit names, by id."""
        found: dict[str, list[AuditRow]] = {}
        for row in Table[AuditRow](self._audit) if self._audit else ():
            found.setdefault(row["id"], []).append(row)
        return found

    @cached_property
    def _refused(self) -> dict[str, RejectedRow]:
        """The rows left out when they are rendered, by data.exclude, or by a weight, by place."""
        paths = [
            self.made[asset] / "info" / f"{name}.parquet"
            for place in self.places.values()
            for asset, name in ((place.rendered, "refused"), (place.split, "rejected"))
            if asset in self.made
        ]
        known = (row for path in dict.fromkeys(paths) if path.exists() for row in Table(path))
        return {row["where"]: row for row in cast(Iterable[RejectedRow], known)}

    @cached_property
    def _copies(self) -> dict[tuple[str, str], CopyRow]:
        found: dict[tuple[str, str], CopyRow] = {}
        tables = {name: table for table, place in self.places.items() for name in place.copies}
        for split in {place.split for place in self.places.values()} & self.made.keys():
            path = self.made[split] / "info" / "near_duplicates.parquet"
            for copy in Table[CopyRow](path) if path.exists() else ():
                key = (tables.get(copy["side"], copy["side"]), copy["id"].partition(".")[0])
                if key not in found or found[key]["kind"] == "within":
                    found[key] = copy
        return found

    @cached_property
    def _twins(self) -> dict[tuple[str, str], Twin]:
        return {
            key: Twin(
                VERBS.get(copy["kind"], "is nearly"),
                f"{copy['of_side']} {copy.get('of_source') or copy['of']}",
                copy["of"].partition(".")[0],
                copy.get("of_text") or "",
                copy["similarity"],
            )
            for key, copy in self._copies.items()
        }


_TEXTS = (
    *("messages", "chosen", "rejected", "source", "row", "problem", "where"),
    *("prompt", "reference", "answer"),
)


def _sampled(table: str, number: int, row: dict[str, Any]) -> RowLine:
    """Return the line of an answer that the SFT model sampled."""
    text, source = _short(f"{row['prompt']} → {row['answer']}"), f"sampled {row['times']} times"
    line = (table, number, row["id"], source)
    if row["used"]:
        return RowLine(*line, row["side"], text, row["used"])
    why = "" if row["outcome"] in PAIRED else row["outcome"]
    return RowLine(*line, "in no pair", text, why)


def _conditions(
    batch: pa.RecordBatch, place: Place, wanted: Wanted, sides: dict[str, pa.Array], start: int
) -> Iterator[pa.Array]:
    """Yield a mask of a batch for each condition."""
    names = batch.schema.names
    none = pa.array([False] * batch.num_rows)
    if wanted.index is not None:
        yield pa.array([start + at == wanted.index for at in range(batch.num_rows)])
    if wanted.id:
        yield pc.starts_with(batch.column("id"), wanted.id) if "id" in names else none
    if wanted.side and place.fixed:
        yield pa.array([wanted.side == place.fixed] * batch.num_rows)
    elif wanted.side and not (sides and place.sides):
        yield none
    elif wanted.side == LEFT_OUT:
        for ids in sides.values():
            yield pc.invert(pc.is_in(batch.column("id"), value_set=ids))
    elif wanted.side:
        ids = sides.get(wanted.side)
        yield none if ids is None else pc.is_in(batch.column("id"), value_set=ids)
    if wanted.text:
        yield _with_text(batch, wanted.text)


def _with_text(batch: pa.RecordBatch, text: str) -> pa.Array:
    """Return a mask of the rows that have a text in one of their texts."""
    mask = pa.array([False] * batch.num_rows)
    for name in set(batch.schema.names) & set(_TEXTS):
        column = batch.column(name)
        if name == "messages":
            turns = pc.struct_field(pc.list_flatten(column), "content")
            hit = pc.fill_null(pc.match_substring(turns, text, ignore_case=True), False)
            parents = pc.list_parent_indices(column).filter(hit)
            numbers = pa.array(range(batch.num_rows), parents.type)
            found = pc.is_in(numbers, value_set=parents)
        else:
            found = pc.fill_null(pc.match_substring(column, text, ignore_case=True), False)
        mask = pc.or_(mask, found)
    return mask


def question(messages: Sequence[Message]) -> str:
    """Return the last text that a user asks, or a plain text."""
    texts = [turn["content"] for turn in messages if turn["role"] in ("user", "text")]
    return texts[-1] if texts else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LINE else f"{text[: LINE - 1]}…"


def _first(path: Path) -> str:
    return pq.read_schema(path).names[0]


def _column(path: Path, name: str) -> pa.Array:
    return pq.read_table(path, columns=[name]).column(0).combine_chunks()


def _rows_at(path: Path, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows with these numbers, in ascending order, decoded."""
    found: list[dict[str, Any]] = []
    start, waiting = 0, list(numbers)
    with pq.ParquetFile(path) as file:
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            own = [number - start for number in waiting if number < start + count]
            if own:
                for batch in file.read_row_group(group).take(own).to_batches():
                    found += rows_of(batch)
            waiting = waiting[len(own) :]
            start += count
    return found
