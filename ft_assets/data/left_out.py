"""Say which trained rows were left out and why, and refuse a split that leaves out too many."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ft_assets.config import DataSettings
from ft_assets.data.tables import Table
from ft_assets.errors import DataError
from ft_assets.rows.types import CopyKind, CopyRow, LeftOutRow, Message, RejectedRow

# What a row does to the held-out row, the surest kind first.
VERBS: dict[CopyKind, str] = {
    "same-prompt": "shares its prompt with",
    "same-group": "is of the group of",
    "same-chat": "is of the chat of",
    "near-duplicate": "is nearly",
    "one-word": "differs in a word from",
    "family": "is of the paraphrases of",
    "contained": "asks a part of",
    "quoted": "quotes",
    "answer": "has the answer of",
}
LONGEST = 300  # characters of a question
# Where rows are left out, by the name of a table and the kind of a row of an older version.
REASONS = {"rejected": "invalid", "refused": "template"}
# The ends of metrics that count rows which are left out.
COUNTED = {
    "rejected": "invalid",
    "duplicates": "duplicate",
    "ties": "ties",
    "unanswered": "unanswered",
    "unpaired": "unpaired",
    "unlabelled": "unlabelled",
    "disputed": "disputed",
    "refused": "template",
    "too_long": "too long",
    "excluded": "excluded",
    "left_by_mixing": "mixing",
}
KIND = "left_out_"  # the beginning of metrics of copies
FEW = 10  # rows; fewer are no reason to stop
SHOWN = 2  # twins in an error
_SIMILAR = (
    "if these prompts ask for different things, raise data.near_duplicate, or set it to null; "
    "if they are variants of each other, give all variants of a prompt the same `group`"
)
_QUOTING = (
    "if these texts give no answer away, raise data.quoted, or set it to null; "
    "if they do, give the rows that share a text the same `group`"
)
ADVICE: dict[CopyKind, str] = {
    "same-prompt": "take held-out rows whose prompts are not trained, or remove the trained rows",
    "same-group": "hold out whole groups: move the trained rows of these groups, or remove them",
    "same-chat": "give all rows of a chat the same `group`, so that they stay on one side",
    "near-duplicate": _SIMILAR,
    "one-word": _SIMILAR,
    "family": _SIMILAR,
    "contained": _QUOTING,
    "quoted": _QUOTING,
    "answer": _QUOTING,
}


def with_sources(copies: list[CopyRow], tables: Sequence[Path]) -> list[CopyRow]:
    """Return copies with the file, line and question of both rows, from tables of raw rows."""
    wanted = {_raw(name) for copy in copies for name in (copy["id"], copy["of"])}
    # A row and its exact copy on another side have one id.
    found: dict[tuple[str, str], tuple[str, str]] = {}
    anywhere: dict[str, tuple[str, str]] = {}
    ids = pa.array(sorted(wanted), pa.string())
    for path in tables if wanted else ():
        for batch in Table(path, ["id", "source", "messages"]).batches():
            # Only the rows that are looked for become Python objects.
            asked = pc.call_function("is_in", [batch.column("id")], pc.SetLookupOptions(ids))
            for row in batch.filter(asked).to_pylist():
                place = (row["source"], question(row["messages"]))
                found[path.stem, row["id"]] = place
                anywhere.setdefault(row["id"], place)
    known: list[CopyRow] = []
    for copy in copies:
        copy = copy.copy()
        own, other = _raw(copy["id"]), _raw(copy["of"])
        if one := found.get((copy["side"], own)) or anywhere.get(own):
            copy["source"], copy["text"] = one
        if two := found.get((copy["of_side"], other)) or anywhere.get(other):
            copy["of_source"], copy["of_text"] = two
        known.append(copy)
    return known


def question(messages: Sequence[Message]) -> str:
    """Return the beginning of the last text that a user asks, or of a plain text."""
    users = [turn["content"] for turn in messages if turn["role"] in ("user", "text")]
    return users[-1][:LONGEST] if users else ""


def _raw(identity: str) -> str:
    """Return the id that raw_dataset has for a row, or for a part of it."""
    return identity.partition(".")[0]


def sentence(copy: CopyRow) -> str:
    """Return what a row repeats, as a sentence."""
    one = copy.get("source") or f"{copy['side']} {copy['id']}"
    other = f"{copy['of_side']} {copy.get('of_source') or copy['of']}"
    return f"{one} {VERBS[copy['kind']]} {other}"


def left_out_rows(folders: Mapping[str, Path]) -> Iterator[LeftOutRow]:
    """Yield every row that is left out, from the artifacts of the assets that leave rows out.

    `folders` are the folders of the artifacts by asset.
    """
    for asset, folder in folders.items():
        for name, kind in REASONS.items():
            path = folder / "info" / f"{name}.parquet"
            for row in Table[RejectedRow](path) if path.exists() else ():
                yield {
                    "reason": row.get("kind") or kind,
                    "source": asset,
                    "where": row["where"],
                    "problem": row["problem"],
                    "text": row["row"],
                    "twin": "",
                    "twin_text": "",
                }
        path = folder / "info" / "near_duplicates.parquet"
        for copy in Table[CopyRow](path) if path.exists() else ():
            if copy["kind"] != "within":
                yield {
                    "reason": copy["kind"],
                    "source": copy["side"],
                    "where": copy.get("source") or copy["id"],
                    "problem": f"{VERBS[copy['kind']]} a held-out row "
                    f"(similarity {copy['similarity']:.2f})",
                    "text": copy.get("text") or "",
                    "twin": f"{copy['of_side']} {copy.get('of_source') or copy['of']}",
                    "twin_text": copy.get("of_text") or "",
                }


def counted(metrics: Sequence[Mapping[str, object]]) -> dict[str, int]:
    """Return the number of rows that are left out, by reason, from the metrics of the assets."""
    counts: Counter[str] = Counter()
    for name, value in ((name, value) for one in metrics for name, value in one.items()):
        if not isinstance(value, int) or name == "rejected":
            continue
        for ending, reason in COUNTED.items():
            if name == ending or name.endswith(f"_{ending}"):
                counts[reason] += value
        if name.startswith(KIND):
            counts[name.removeprefix(KIND)] += value
    return {reason: count for reason, count in counts.most_common() if count}


def require_few(
    copies: list[CopyRow],
    rows: Mapping[str, int],
    data: DataSettings,
    fixed: bool,
    asset: str = "heldout_split",
) -> None:
    """Raise DataError if more than data.max_left_out of the rows of a source are left out.

    `rows` are the rows of each source that could be trained. A row beside the conversations whose
    prompt is held out by its hash is expected, so data.heldout_share is added for these sources.
    """
    for source, total in rows.items():
        own = [copy for copy in copies if copy["side"] == source]
        expected = 0 if fixed or source == "conversations" else data.heldout_share
        most = min(1.0, data.max_left_out + expected)
        if len(own) < FEW or len(own) <= most * total:
            continue
        kinds = Counter[CopyKind](copy["kind"] for copy in own).most_common()
        largest = kinds[0][0]
        twins = [copy for copy in own if copy["kind"] == largest][:SHOWN]
        raise DataError(
            where=f"{asset}: {source}",
            found=f"{len(own)} of {total} rows repeat held-out rows and are left out ("
            + ", ".join(f"{kind}: {count}" for kind, count in kinds)
            + "), e.g. "
            + "; ".join(map(sentence, twins)),
            expected=f"at most {most:.0%} (data.max_left_out)",
            fix=f"{ADVICE[largest]}; or raise data.max_left_out to train without these rows",
        )
