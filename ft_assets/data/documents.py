"""Split documents into training and validation, without those that repeat a held-out row.

A document that is longer than the context is trained in pieces of about the same length.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ft_assets.config import DataSettings
from ft_assets.data.boilerplate import common_of
from ft_assets.data.leakage import HELD_OUT, Chain, find_copies, texts
from ft_assets.data.left_out import require_few, with_sources
from ft_assets.data.tables import Table
from ft_assets.rows.types import CopyRow, MemberRow

DOCUMENTS = "documents"


def repeated(
    documents: Path, split: Path, targets: Path, raw: Sequence[Path], data: DataSettings
) -> list[CopyRow]:
    """Return a copy for each document that repeats a held-out, general or contamination row.

    `documents`: the table of raw_text. `raw`: the tables with the file and line of each row.
    Raises DataError if they are more than data.max_left_out.
    """
    own = texts(documents)
    held_out = {name: texts(split / f"{name}.parquet") for name in HELD_OUT}
    held_out["contamination"] = texts(targets)
    common = common_of([own, Chain(held_out.values())])
    copies, _ = find_copies({DOCUMENTS: own}, held_out, data, common)
    copies = with_sources(copies, [documents, *raw])
    require_few(copies, {DOCUMENTS: len(own)}, data, fixed=True, asset="text_dataset")
    return copies


def validation_groups(documents: Path, removed: set[str], data: DataSettings) -> set[str]:
    """Return the groups of documents that are measured and not trained on.

    Their number is data.validation_share of all, at least one if there are two or more. The hash
    of the group decides, whatever the order.
    """
    rows = Table[MemberRow](documents, ["id", "group"])
    groups = Counter(row["group"] for row in rows if row["id"] not in removed)
    if not data.validation_share or len(groups) < 2:
        return set()
    number = max(1, round(data.validation_share * len(groups)))

    def place(group: str) -> str:
        return hashlib.sha256(f"{data.split_salt}:text:{group}".encode()).hexdigest()

    return set(sorted(groups, key=place)[:number])


def pieces(ids: Sequence[int], most: int, bos: int | None) -> Iterator[list[int]]:
    """Yield the tokens of a document in pieces of at most `most` tokens, in order.

    The lengths differ by one at most, so that no piece is a stub. Each piece begins with `bos` if
    it is given; it is the first of `ids` then.
    """
    head = [] if bos is None else [bos]
    body = ids[len(head) :]
    room = most - len(head)
    count = max(1, -(-len(body) // room))
    for number in range(count):
        start, end = (len(body) * edge // count for edge in (number, number + 1))
        yield [*head, *body[start:end]]
