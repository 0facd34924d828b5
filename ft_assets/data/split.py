"""Split rows into the held-out side and the trained sides.

The hash of a row's group decides its side, so growing the data never moves a row. A row is removed
from training, and counted, if it is also in the held-out rows, the general rows or the user's
evaluation files, if it is nearly the same as one of these, or if it quotes one. Rows are streamed;
only held-out groups and prompts and the ids of removed rows stay in memory.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import xxhash

from ft_assets.config import DataSettings
from ft_assets.data.boilerplate import Common, common_of
from ft_assets.data.excluded import excluded_rows, is_excluded
from ft_assets.data.leakage import TEXTS, Chain, clusters, find_copies, within
from ft_assets.data.left_out import require_few, with_sources
from ft_assets.data.mixing import KEY_OF, Mixing, is_copy
from ft_assets.data.origins import Origins
from ft_assets.data.tables import (
    JUDGED,
    NEAR_DUPLICATE,
    REJECTED,
    TOKENIZED,
    TOKENIZED_PREFERENCE,
    Layout,
    Table,
    TableWriter,
    rows_of,
    select,
    with_cluster,
    write_table,
)
from ft_assets.errors import DataError
from ft_assets.rows.types import CopyRow, MemberRow, PairRow, RejectedRow, TextRow

SOURCES = ("conversations", "rehearsal", "heldout", "retention", "preferences")
TRAINED_SOURCES = ("conversations", "rehearsal", "preferences")
SIDES = ("train", "validation", "heldout", "retention", "preferences", "preferences_validation")
PAIRS = ("preferences", "preferences_validation")
MIN_VALIDATION_PAIRS = 8  # fewer show nothing about a DPO: they are trained on
MEMBERSHIP = ["id", "group", "stratum", "judged"]
STRATIFIED = ("train", "validation", "heldout")
NO_ROWS = {  # advice by the empty side, and by whether data.heldout names the held-out rows
    ("train", True): "add rows to data.train whose prompts are not in data.heldout",
    ("train", False): "add rows: those of one group, or with one prompt, are on one side",
    ("heldout", True): "give data.heldout conversations that end in an answer",
    ("heldout", False): "add rows, raise data.heldout_share, or name a file in data.heldout",
}
EQUAL = ("same-prompt", "same-group", "same-chat")  # kinds that are found without similarity
PART = ""  # excluded, or a part of what is elsewhere as a whole: on no side, and not lost
Strata = dict[str, dict[str, int]]  # {stratum: {side: rows}}


@dataclass(frozen=True)
class Split:
    """The outcome of `make_split`: the counts, and the version of each side."""

    counts: dict[str, int | float]
    versions: dict[str, str]


@dataclass(frozen=True)
class Side:
    """The rows of a table that `wanted` accepts; they can be iterated more than once."""

    path: Path
    wanted: Callable[[MemberRow], bool]

    def __len__(self) -> int:
        return sum(1 for row in _members(self.path) if self.wanted(row))

    def __iter__(self) -> Iterator[TextRow]:
        accepts = cast(Callable[[dict[str, Any]], bool], self.wanted)
        for batch in Table(self.path, [*MEMBERSHIP, *TEXTS[2:]]).batches():
            yield from cast(list[TextRow], rows_of(select(batch, accepts, MEMBERSHIP)))


def is_heldout(group: str, share: float, salt: str = "", number: int = 0) -> bool:
    """Return True if a group is in a slice of the hash range, by default the first.

    It depends only on the group, the share, the salt and the number of the slice.
    """
    value = int.from_bytes(hashlib.sha256(f"{salt}:{group}".encode()).digest()[:8], "big")
    return number * share <= value / 2**64 < (number + 1) * share


@dataclass
class _Rules:
    """The rules that decide the side of each row."""

    data: DataSettings
    fixed: bool  # data.heldout names a file: no other row is held out
    held_out_groups: set[str] = field(default_factory=set)
    removed: dict[str, set[str]] = field(default_factory=dict)  # ids of copies by source
    excluded: dict[str, RejectedRow] = field(default_factory=dict)
    validation_pairs: bool = False

    def share(self, row: MemberRow) -> float:
        shares = self.data.stratify.shares if self.data.stratify else {}
        return shares.get(row.get("stratum") or "", self.data.heldout_share)

    def held_out(self, row: MemberRow) -> bool:
        return (
            not self.fixed
            and bool(row.get("judged"))
            and is_heldout(
                row["group"], self.share(row), self.data.split_salt, self.data.heldout_slice
            )
        )

    def compared(self, source: str, row: MemberRow) -> bool:
        """Return True for a row that would be trained if it repeated no held-out row."""
        part = not row.get("judged", True) and not self.trainable(row)
        if part or is_excluded(self.excluded, row):
            return False
        return not (source == "conversations" and self.held_out(row))

    def trainable(self, row: MemberRow) -> bool:
        return row["group"] not in self.held_out_groups

    def validation(self, row: MemberRow) -> bool:
        salt = f"{self.data.split_salt}:validation"
        return is_heldout(row["group"], self.data.validation_share, salt)

    def validation_pair(self, row: MemberRow) -> bool:
        removed = row["id"] in self.removed["preferences"] or is_excluded(self.excluded, row)
        return self.trainable(row) and not removed and self.validation(row)

    def side(self, source: str, row: MemberRow) -> str | None:
        """Return the side of a row of a source; PART, or None if the row is removed."""
        if source in ("heldout", "retention"):
            return source if row.get("judged") else PART
        if source == "conversations" and self.held_out(row):
            return "heldout"
        if is_excluded(self.excluded, row):
            return PART
        if not self.trainable(row) or row["id"] in self.removed[source]:
            return None if row.get("judged", True) else PART
        if source == "preferences":
            validation = self.validation_pairs and self.validation(row)
            return "preferences_validation" if validation else source
        return "validation" if source == "conversations" and self.validation(row) else "train"


def make_split(
    chat: Path,
    targets: Path,
    output: Path,
    data: DataSettings,
    raw: Sequence[Path] = (),
    exclude: Sequence[str] = (),
    origins: Path | None = None,
) -> Split:
    """Write the sides to `output`, and the removed rows with their reasons to its `info`.

    `chat` holds the rendered conversations, rehearsal, heldout (a fixed file, or empty), retention
    and preferences. `targets` are texts that must not be trained on. `raw` are the tables that
    have the file and line of each row. `exclude`: see excluded_ids. `origins` is the table with the
    entry of each row, if a key has several. Raises DataError if too many rows are removed, or if no
    train row or no held-out row is left.
    """
    mixing = Mixing(data, Origins(data, origins))
    tables = {name: chat / f"{name}.parquet" for name in SOURCES}
    rules = _Rules(data, fixed=len(Table(tables["heldout"])) > 0)
    rules.excluded = _excluded(exclude, raw, rules, tables)
    rules.held_out_groups = _held_out_groups(rules, tables, targets)
    copies, common = _find_copies(rules, tables, targets)
    copies = with_sources(copies, raw)
    rules.removed = {
        name: {copy["id"] for copy in copies if copy["side"] == name} for name in TRAINED_SOURCES
    }
    pairs = Side(tables["preferences"], rules.validation_pair)
    rules.validation_pairs = len(pairs) >= MIN_VALIDATION_PAIRS
    judged = _judged(rules, tables)
    _settle(mixing, tables, rules)
    sources, strata, versions = _write(tables, output, rules, judged, mixing)
    counts: dict[str, int | float] = {**_counts(sources), **_mixed(mixing)}
    counts |= {f"{name}_groups": len(set(side.values())) for name, side in judged.items()}
    counts |= _labels(output / "preferences.parquet", counts["preference_pairs"])
    require_few(copies, _trainable(sources), data, rules.fixed)
    _require_rows(counts, rules, mixing)
    counts |= _shares(rules, tables["conversations"], counts["heldout_rows"])
    kinds = Counter(copy["kind"] for copy in copies)
    counts["left_out"] = len(copies)
    counts |= {f"left_out_{kind}": count for kind, count in kinds.items()}
    counts["near_duplicates_removed"] = sum(kinds[kind] for kind in kinds if kind not in EQUAL)
    sides = {name: Side(output / f"{name}.parquet", _once) for name in SIDES}
    inside = within(sides, data, common)
    for name in SIDES:
        counts[f"{name}_near_duplicates_within"] = sum(copy["side"] == name for copy in inside)
    info = output / "info"
    info.mkdir()
    write_table(info / "near_duplicates.parquet", [*copies, *inside], NEAR_DUPLICATE)
    common.write(info / "boilerplate.json")
    mixing.write(info)
    lost = itertools.chain(
        rules.excluded.values(), mixing.left_out({path.stem: path for path in raw})
    )
    if rules.excluded or mixing.mixes:
        counts |= {"excluded": len(rules.excluded)} if rules.excluded else {}
        write_table(info / "rejected.parquet", lost, REJECTED)
    (info / "strata.json").write_text(json.dumps(strata, indent=1, ensure_ascii=False))
    return Split(counts, versions)


def _excluded(
    wanted: Sequence[str], raw: Sequence[Path], rules: _Rules, tables: dict[str, Path]
) -> dict[str, RejectedRow]:
    """Return the rows that data.exclude names, as far as this base model has them."""

    def held_out(ids: set[str]) -> set[str]:
        rows = (row for row in _members(tables["conversations"]) if row["id"] in ids)
        return {row["id"] for row in rows if rules.held_out(row)}

    if not (found := excluded_rows(wanted, raw, held_out)):
        return {}
    rendered = {
        row["id"].partition(".")[0]
        for source in TRAINED_SOURCES
        for row in _members(tables[source])
        if is_excluded(found, row)
    }
    return {row_id: row for row_id, row in found.items() if row_id in rendered}


def _held_out_groups(rules: _Rules, tables: dict[str, Path], targets: Path) -> set[str]:
    groups = {
        row["group"]
        for path in (tables["retention"], tables["heldout"], targets)
        for row in Table[MemberRow](path, ["group"])
    }
    held_out = (row["group"] for row in _members(tables["conversations"]) if rules.held_out(row))
    return groups.union(held_out)


def _find_copies(
    rules: _Rules, tables: dict[str, Path], targets: Path
) -> tuple[list[CopyRow], Common]:
    trained = {name: Side(tables[name], partial(rules.compared, name)) for name in TRAINED_SOURCES}
    held_out = {
        "heldout": _heldout(rules, tables),
        "retention": Side(tables["retention"], _whole),
        "contamination": Side(targets, _every),
    }
    common = common_of([*trained.values(), *held_out.values()])
    return find_copies(trained, held_out, rules.data, common)


def _heldout(rules: _Rules, tables: dict[str, Path]) -> Chain:
    return Chain([Side(tables["conversations"], rules.held_out), Side(tables["heldout"], _whole)])


def _judged(rules: _Rules, tables: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Return the cluster of each row of the judged sides: {side: {id: cluster}}."""
    sides = {
        "heldout": _heldout(rules, tables),
        "retention": Side(tables["retention"], _whole),
    }
    return {name: clusters(rows, rules.data) for name, rows in sides.items()}


def _members(path: Path) -> Table[MemberRow]:
    return Table(path, MEMBERSHIP)


def _every(_: MemberRow) -> bool:
    return True


def _once(row: MemberRow) -> bool:
    return not is_copy(row["id"])


def _whole(row: MemberRow) -> bool:
    return bool(row.get("judged"))


def _settle(mixing: Mixing, tables: dict[str, Path], rules: _Rules) -> None:
    """Decide which rows the weights take, of all rows of the train side."""
    for table in mixing.mixes:
        for batch in Table(tables[table], MEMBERSHIP).batches():
            members = _members_of(batch)
            mixing.add(table, [row["id"] for row in members if rules.side(table, row) == "train"])
    mixing.settle()


def _mixed(mixing: Mixing) -> dict[str, int]:
    """Return the counts of the train side with its weights; {} if it has none."""
    if not mixing.mixes:
        return {}
    lines = mixing.lines()
    counts = {
        f"{table.replace('conversations', 'train')}_rows": sum(
            line.trained for line in lines if line.key == key
        )
        for table, key in KEY_OF.items()
    }
    return {**counts, "left_by_mixing": sum(line.unused for line in lines)}


def _write(
    tables: dict[str, Path],
    output: Path,
    rules: _Rules,
    judged: dict[str, dict[str, str]],
    mixing: Mixing,
) -> tuple[Counter[tuple[str, str | None]], Strata, dict[str, str]]:
    """Write each row to its side.

    Returns the number of rows by (source, side), the strata, and the version of each side.
    """
    sources: Counter[tuple[str, str | None]] = Counter()
    strata: Strata = {}
    with ExitStack() as stack:
        writers: dict[str, TableWriter[Any]] = {}
        for name in SIDES:
            layout: Layout[Any] = TOKENIZED_PREFERENCE if name in PAIRS else TOKENIZED
            layout = JUDGED if name in judged else layout
            writers[name] = stack.enter_context(TableWriter(output / f"{name}.parquet", layout))
        for source, path in tables.items():
            for batch in Table(path).batches():
                members = _members_of(batch)
                chosen = [rules.side(source, row) for row in members]
                for name in dict.fromkeys(name for name in chosen if name):
                    part = batch.filter(pa.array([entry == name for entry in chosen]))
                    part = with_cluster(part, judged[name]) if name in judged else part
                    parts = mixing.trained(source, part) if name == "train" else [part]
                    for one in parts:
                        writers[name].copy(one)
                if source in KEY_OF:
                    mixing.count(source, batch, chosen)
                sources.update((source, name) for name in chosen)
                _count_strata(strata, members, chosen)
        versions = {name: writer.version for name, writer in writers.items()}
    return sources, strata, versions


def _members_of(batch: pa.RecordBatch) -> list[MemberRow]:
    columns = [name for name in MEMBERSHIP if name in batch.schema.names]
    return cast(list[MemberRow], batch.select(columns).to_pylist())


def _count_strata(strata: Strata, members: list[MemberRow], sides: list[str | None]) -> None:
    for row, side in zip(members, sides, strict=True):
        stratum = row.get("stratum")
        if stratum is not None and side in STRATIFIED:
            strata.setdefault(stratum, dict.fromkeys(STRATIFIED, 0))[side] += 1


def _counts(sources: Counter[tuple[str, str | None]]) -> dict[str, int]:
    return {
        "train_rows": sources[("conversations", "train")],
        "rehearsal_rows": sources[("rehearsal", "train")],
        "validation_rows": sources[("conversations", "validation")],
        "heldout_rows": sources[("conversations", "heldout")] + sources[("heldout", "heldout")],
        "retention_rows": sources[("retention", "retention")],
        "preference_pairs": sources[("preferences", "preferences")],
        "preference_validation_pairs": sources[("preferences", "preferences_validation")],
        "train_rows_removed": sources[("conversations", None)],
        "rehearsal_rows_removed": sources[("rehearsal", None)],
        "pairs_removed": sources[("preferences", None)],
    }


def _labels(pairs: Path, rows: float) -> dict[str, float]:
    """Return the numbers of pairs and of labelled answers without a partner, if there are any."""
    answers = Table[PairRow](pairs, ["chosen", "rejected"])
    labels = sum(1 for row in answers if not (row["chosen"] and row["rejected"]))
    return {"preference_pairs": rows - labels, "preference_labels": labels} if labels else {}


def _trainable(sources: Counter[tuple[str, str | None]]) -> dict[str, int]:
    """Return the rows of each trained source that are not held out, left out or not."""
    return {
        name: sum(
            count
            for (source, side), count in sources.items()
            if source == name and side not in ("heldout", PART)
        )
        for name in TRAINED_SOURCES
    }


def _shares(rules: _Rules, conversations: Path, heldout_rows: float) -> dict[str, float]:
    """Return the held-out share that was asked for and the realised one, and their groups."""
    if rules.fixed:
        return {}
    groups: list[int] = []
    asked = 0.0
    for row in _members(conversations):
        if row.get("judged"):
            groups.append(xxhash.xxh3_64_intdigest(row["group"].encode()))
            asked += rules.share(row)
    _, sizes = np.unique(np.array(groups, dtype=np.uint64), return_counts=True)
    return {
        "heldout_share": round(heldout_rows / len(groups), 4),
        "heldout_share_asked": round(asked / len(groups), 4),
        "groups": len(sizes),
        "largest_group_rows": int(sizes.max()),
    }


def _require_rows(counts: Mapping[str, float], rules: _Rules, mixing: Mixing) -> None:
    for name in ("train", "heldout"):
        if not counts[f"{name}_rows"]:
            side = name.replace("heldout", "held-out")
            total = sum(counts[f"{one}_rows"] for one in ("train", "validation", "heldout"))
            unused = counts.get("left_by_mixing", 0)
            total += counts["train_rows_removed"] + unused
            raise DataError(
                where="split",
                found=f"no {side} rows out of {total}",
                expected="at least one row on each side",
                fix="raise a weight of data.train: the weights leave out all rows"
                if name == "train" and mixing.unused["conversations"]
                else NO_ROWS[name, rules.fixed],
            )
