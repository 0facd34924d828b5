"""Texts in the form in which they are compared: units, hashes of units, ends of sentences.

A run is the hash of consecutive units. Equal runs are equal texts but for a chance of 2^-32 (of
three units) or 2^-64 (of more).
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import regex
import xxhash

from ft_assets.data.units import units

Hashes = npt.NDArray[np.uint64]

SHINGLE = 3  # units
ANCHOR = 4  # units: the shortest text that shows anything when it stands in another
GRAM = 13  # units
# A number to the power of 1, 2, 4, …: it moves a run by as many units.
_POWERS = [np.uint64(pow(0x9E3779B97F4A7C15, 2**step, 2**64)) for step in range(32)]
_CACHED = 2**20  # hashes of units that are kept
# The ends of sentences and lines, a blank in a script that has no other, and the mark of an option.
_OPTION = r"\s(?=\(?[A-Ha-h1-9][.)]\s)"
_ASCII_BREAK = re.compile(rf"[.?!:;]+(?=\s|$)|\n+|{_OPTION}")
_BREAK = regex.compile(
    rf"[.?!:;]+(?=\s|$)|[。？！；：｡۔؟।॥…\n]+|{_OPTION}"
    r"|(?<=[\p{Script=Thai}\p{Script=Lao}])\s"
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
        # Runs of double the length, as often as the binary form of `length` asks.
        total, done, doubled = self.hashes[:0], 0, self.hashes
        for step in range(length.bit_length()):
            size = 1 << step
            if length & size:
                part = doubled[done : done + count]
                total = total * _POWERS[step] + part if done else part
                done += size
            doubled = doubled[:-size] * _POWERS[step] + doubled[size:]
        return total

    def part(self, start: int, end: int) -> int:
        """Return the hash of some units."""
        return Text([], self.hashes[start:end], frozenset()).runs(end - start)[0].item()

    @cached_property
    def grams(self) -> frozenset[int]:
        """The hashes of the runs of 13 units."""
        return frozenset(self.runs(GRAM).tolist())

    @cached_property
    def anchors(self) -> list[int]:
        """The hash of each run of four units, in order."""
        return self.runs(ANCHOR).tolist()

    @cached_property
    def joined(self) -> str:
        """The units with single blanks."""
        return " ".join(self.units)

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
    for sentence in (_ASCII_BREAK if text.isascii() else _BREAK).split(text):
        found += units(sentence)
        breaks.add(len(found))
    return Text(found, hashes_of(found), frozenset(breaks))
