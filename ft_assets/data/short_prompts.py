"""Find short prompts that differ in one word, or in one letter of one word.

Of a prompt of a few words, one changed word changes most triples, so similarity does not see it.
Each prompt is indexed without each of its words (a deletion neighbourhood, as in SymSpell); in a
script without blanks, without up to four letters. A gap
that several words fill is the slot of a template, such as `where is my _`, and its words are
content. So are numbers. Memory holds the indexed prompts, and a few rows a gap.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ft_assets.data.texts import Text, hashes_of, word_key
from ft_assets.data.units import is_blankless

LEAST, MOST = 4, 32  # units of a short prompt
OWNERS = 64  # indexed prompts that differ in one gap alone; more are of a template
FILLERS = 4  # distinct words in a gap that make it a slot
KEPT = 200  # rows that wait for the decision on a gap with so many words
SCATTERED = 0.6  # share of a prompt's gaps that other words fill
MANY = 6  # units of a prompt to which a word in the middle may be added
LAST = 9  # units of a prompt below which its last one is its subject: the capital of _
LETTERS = 4  # of a word in a script without blanks
TYPO = 4  # letters of a word in which one may be wrong
_NUMBER = re.compile(r"[\d.,]+")
RowName = tuple[str, str]  # (side, id)
_MASK = 2**64 - 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_MIXER = 0xD6E8FEB86659FD93
_SHIFT = 3  # bits of a length


@dataclass
class _Gap:
    """A prompt without the word at one place: the words that fill it, and the rows that do."""

    fillers: set[str] = field(default_factory=set)
    waiting: list[tuple[RowName, str]] = field(default_factory=list)  # (row, its word)


class ShortIndex:
    """Finds the indexed short prompts that differ in one word.

    Ask `decided` after all rows. `words` are the hashes of known words: an unknown one may be a
    misspelling. `slots` are gaps that are known to be slots, and those that were found.
    """

    def __init__(self, words: frozenset[int], slots: frozenset[int]) -> None:
        self.slots = set(slots)
        self._words = words
        self._prompts: list[tuple[str, list[str]]] = []  # (id, units)
        self._whole: dict[int, int] = {}  # numbers of prompts; equal ones count once
        self._without: dict[int, tuple[int, ...]] = {}  # numbers of prompts, shifted, and lengths
        self._gaps: dict[int, _Gap] = {}  # those that a row fills

    def add(self, identity: str, text: Text) -> None:
        if not LEAST <= len(text.units) <= MOST:
            return
        hashed = _Hashed(text.hashes.tolist())
        number = self._whole.setdefault(hashed.whole, len(self._prompts))
        if number < len(self._prompts):
            return
        self._prompts.append((identity, text.units))
        for place, length in _words_of(text.units):
            key = hashed.around(place, length)
            owners = self._without.get(key, ())
            if len(owners) < OWNERS:
                self._without[key] = (*owners, number << _SHIFT | length)
            else:  # a template: so many prompts differ in this gap alone
                self.slots.add(key)

    def matches(self, row: RowName, text: Text) -> Iterator[tuple[str, float]]:
        """Yield (id, similarity) of prompts with a misspelt, an additional, or a missing word."""
        count = len(text.units)
        if not self._prompts or not LEAST - 1 <= count <= MOST + 1:
            return
        hashed = _Hashed(text.hashes.tolist())
        found: list[int] = []
        for place in range(count):
            number = self._whole.get(hashed.without(place))
            if number is not None and _may_be_added(text.units, self._prompts[number][1]):
                found.append(number)
        for place in range(count + 1):
            for stored in self._without.get(hashed.around(place, 0), ()):
                number = stored >> _SHIFT
                if _may_be_added(self._prompts[number][1], text.units):
                    found.append(number)
        for place, length in _words_of(text.units):
            found += self._filled(row, text.units, place, length, hashed.around(place, length))
        for number in found:
            yield self._prompts[number][0], 1 - 1 / max(count, LEAST)

    def _filled(
        self, row: RowName, units: list[str], place: int, length: int, key: int
    ) -> Iterator[int]:
        """Note that a row fills a gap; yield the prompts of which it is a misspelling."""
        for stored in self._without.get(key, ()):
            number, other_length = stored >> _SHIFT, stored & (1 << _SHIFT) - 1
            identity, others = self._prompts[number]
            own, other = units[place : place + length], others[place : place + other_length]
            if identity == row[1] or own[0] == other[0] or own[-1] == other[-1]:
                continue
            if self._misspelt("".join(own), "".join(other)):
                yield number
            gap = self._gaps.setdefault(key, _Gap())
            gap.fillers |= {"".join(own), "".join(other)}
            if len(gap.fillers) < FILLERS or len(gap.waiting) < KEPT:
                gap.waiting.append((row, "".join(own)))
            else:
                self.slots.add(key)

    def decided(self) -> Iterator[tuple[RowName, str, float]]:
        """Yield (row, id, similarity) of the rows with another word in a gap that is no slot."""
        known = frozenset(self.slots)
        for identity, units in self._prompts:
            hashed = _Hashed(hashes_of(units).tolist())
            filled = {
                (place, length): key
                for place, length in _words_of(units)
                if (key := hashed.around(place, length)) in self._gaps
            }
            # Words that change in most places are a paraphrase's, and no slot's.
            places = len({place for place, _ in filled})
            scattered = places >= max(LEAST, SCATTERED * len(units))
            for (place, length), key in filled.items():
                gap, own = self._gaps[key], "".join(units[place : place + length])
                if place == len(units) - 1 < LAST:
                    continue
                if key in known or (len(gap.fillers) >= FILLERS and not scattered):
                    self.slots.add(key)
                    continue
                for row, word in gap.waiting:
                    if word != own and not _differ_in_number(word, own):
                        yield row, identity, 1 - length / len(units)

    def _misspelt(self, one: str, other: str) -> bool:
        if min(len(one), len(other)) < TYPO or _differ_in_number(one, other):
            return False
        known = all(word_key(word) in self._words for word in (one, other))
        return not known and _one_letter_apart(one, other)


def _words_of(units: list[str]) -> Iterator[tuple[int, int]]:
    """Yield (place, length) of what may be a word: a unit, or some letters without blanks."""
    for place, unit in enumerate(units):
        yield place, 1
        length = 1
        while is_blankless(unit) and length < LETTERS and place + length < len(units):
            unit = units[place + length]
            length += 1
            if is_blankless(unit):
                yield place, length


class _Hashed:
    """Hashes of a prompt, and of what is around a gap in it."""

    def __init__(self, values: list[int]) -> None:
        self._before, self._after, self._power = [0], [0], [1]
        for value in values:
            self._before.append((self._before[-1] * _MULTIPLIER + value) & _MASK)
            self._power.append(self._power[-1] * _MULTIPLIER & _MASK)
        for place, value in enumerate(reversed(values)):
            self._after.append((value * self._power[place] + self._after[-1]) & _MASK)
        self.whole = self._before[-1]

    def without(self, place: int) -> int:
        """Return the hash of the prompt without one unit, which may be another prompt's `whole`."""
        left = len(self._after) - 2 - place
        return (self._before[place] * self._power[left] + self._after[left]) & _MASK

    def around(self, place: int, length: int) -> int:
        """Return the hash of what is before and after a gap, and of its place."""
        left = len(self._after) - 1 - place - length
        return (self._before[place] + self._after[left] * _MIXER ^ place + 1) & _MASK


def _differ_in_number(one: str, other: str) -> bool:
    """Return True for 100 and 101, and for iphone15 and iphone16: numbers are content."""
    letters, others = (_NUMBER.sub("", word) for word in (one, other))
    return not letters or not others or letters == others


def _may_be_added(longer: list[str], shorter: list[str]) -> bool:
    """Return True if the additional word leaves the prompt the same: at an end, or of many."""
    place = next((i for i, unit in enumerate(shorter) if unit != longer[i]), len(shorter))
    return (place in (0, len(shorter)) or len(shorter) >= MANY) and bool(
        _NUMBER.sub("", longer[place])
    )


def _one_letter_apart(one: str, other: str) -> bool:
    """Return True if one letter differs, is missing, or is swapped with the next one."""
    if len(one) > len(other):
        one, other = other, one
    if len(other) - len(one) > 1:
        return False
    same = next((i for i, letter in enumerate(one) if letter != other[i]), len(one))
    if len(one) < len(other):
        return one[same:] == other[same + 1 :]
    swapped = one[same : same + 2] == other[same : same + 2][::-1]
    return one[same + 1 :] == other[same + 1 :] or (
        swapped and one[same + 2 :] == other[same + 2 :]
    )
