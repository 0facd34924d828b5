"""Texts in the form in which they are compared: units, hashes of units, ends of sentences.

A run is the hash of consecutive units. Equal runs are equal texts but for a chance of 2^-32 (of
three units) or 2^-64 (of more).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import regex
import xxhash

from ft_assets.data.units import units

Hashes = npt.NDArray[np.uint64]

SHINGLE = 3  # units
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_CACHED = 2**20  # hashes of units that are kept
# The ends of sentences and lines, a blank in a script that has no other, and the mark of an option.
_BREAK = regex.compile(
    r"[.?!:;]+(?=\s|$)|[。？！；：｡۔؟।॥…\n]+"
    r"|(?<=[\p{Script=Thai}\p{Script=Lao}])\s|\s(?=\(?[A-Ha-h1-9][.)]\s)"
)


class _UnitHashes(dict[str, int]):
    def __missing__(self, unit: str) -> int:
        value = xxhash.xxh3_64_intdigest(unit.encode("utf-8", "surrogatepass"))
        if len(self) < _CACHED:
            self[unit] = value
        return value


_HASHES = _UnitHashes()


@dataclass(frozen=True, eq=False)
class Text:
    """A text: its units, their hashes, and the positions at which a sentence begins or ends."""

    units: list[str]
    hashes: Hashes
    breaks: frozenset[int]

    def runs(self, length: int) -> Hashes:
        """Return the hash of each run of `length` units, in order."""
        count = len(self.hashes) - length + 1
        if count <= 0:
            return self.hashes[:0]
        total = self.hashes[:count].copy()
        for place in range(1, length):
            total *= _MULTIPLIER
            total += self.hashes[place : place + count]
        return total

    def shingles(self) -> frozenset[int]:
        """Return the hashes of all triples of units, or of the whole text if it is shorter."""
        found = self.runs(min(SHINGLE, max(1, len(self)))) >> np.uint64(32)
        return frozenset(found.tolist())

    def without_units(self) -> "Text":
        """Return the text without its units, which need most of the memory."""
        return Text([], self.hashes, self.breaks)

    def __len__(self) -> int:
        return len(self.hashes)

    def __add__(self, other: "Text") -> "Text":
        moved = len(self)
        return Text(
            self.units + other.units,
            np.concatenate([self.hashes, other.hashes]),
            self.breaks | {moved + place for place in other.breaks},
        )


def hashes_of(parts: list[str]) -> Hashes:
    """Return the hash of each unit."""
    return np.array([_HASHES[unit] for unit in parts], dtype=np.uint64)


def word_key(unit: str) -> int:
    """Return the 32-bit hash of a unit."""
    return _HASHES[unit] >> 32


def parsed(text: str) -> Text:
    """Return the comparable form of a text."""
    found: list[str] = []
    breaks = {0}
    for sentence in _BREAK.split(text):
        found += units(sentence)
        breaks.add(len(found))
    return Text(found, hashes_of(found), frozenset(breaks))
