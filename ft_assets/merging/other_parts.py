"""Compare the tensors outside the text part of a model with the base's, by the hash of their bytes.

It is independent of the merge and of its audit, which go by the adapter's names.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from ft_assets.merging.tensor_files import Entry, entries_of, read_folder
from ft_assets.models.text_part import stored_names

BLOCK = 1 << 24


class OtherParts(NamedTuple):
    """The number of tensors outside the text part, and the names of those that changed."""

    tensors: int
    changed: list[str]


def other_parts(snapshot: Path, merged: Path) -> OtherParts:
    """Return the comparison of the tensors that are not of the text part.

    A tensor that one of the two lacks is changed. A model without other parts has none.
    """
    text = set(stored_names(snapshot).values())
    if not text:
        return OtherParts(0, [])
    before, after = (entries_of(read_folder(folder)) for folder in (snapshot, merged))
    others = sorted((set(before) | set(after)) - text)
    changed = [
        name
        for name in others
        if name not in before or name not in after or _hash(before[name]) != _hash(after[name])
    ]
    return OtherParts(len(others), changed)


def _hash(entry: Entry) -> str:
    digest = hashlib.sha256(f"{entry.dtype} {entry.shape}".encode())
    with entry.file.open("rb") as file:
        file.seek(entry.begin)
        left = entry.bytes
        while left and (block := file.read(min(BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
