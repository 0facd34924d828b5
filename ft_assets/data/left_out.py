"""Say which trained rows were left out and why, and refuse a split that leaves out too many."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from ft_assets.config import DataSettings
from ft_assets.data.tables import Table
from ft_assets.errors import DataError
from ft_assets.rows.types import ConversationRow, CopyKind, CopyRow

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


def with_sources(copies: list[CopyRow], tables: Iterable[Path]) -> list[CopyRow]:
    """Return copies with the file and line of both rows, from tables that have `source`."""
    sources = dict.fromkeys(_raw(name) for copy in copies for name in (copy["id"], copy["of"]))
    found: dict[str, str] = {}
    for path in tables if sources else ():
        for row in Table[ConversationRow](path, ["id", "source"]):
            if row["id"] in sources:
                found.setdefault(row["id"], row["source"])
    known: list[CopyRow] = []
    for copy in copies:
        copy = copy.copy()
        if one := found.get(_raw(copy["id"])):
            copy["source"] = one
        if other := found.get(_raw(copy["of"])):
            copy["of_source"] = other
        known.append(copy)
    return known


def _raw(identity: str) -> str:
    """Return the id that raw_dataset has for a row, or for a part of it."""
    return identity.partition(".")[0]


def sentence(copy: CopyRow) -> str:
    """Return what a row repeats, as a sentence."""
    one = copy.get("source") or f"{copy['side']} {copy['id']}"
    other = f"{copy['of_side']} {copy.get('of_source') or copy['of']}"
    return f"{one} {VERBS[copy['kind']]} {other}"


def require_few(
    copies: list[CopyRow], rows: Mapping[str, int], data: DataSettings, fixed: bool
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
            where=f"heldout_split: {source}",
            found=f"{len(own)} of {total} rows repeat held-out rows and are left out ("
            + ", ".join(f"{kind}: {count}" for kind, count in kinds)
            + "), e.g. "
            + "; ".join(map(sentence, twins)),
            expected=f"at most {most:.0%} (data.max_left_out)",
            fix=f"{ADVICE[largest]}; or raise data.max_left_out to train without these rows",
        )
