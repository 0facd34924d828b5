"""Find short prompts that differ in one word, or in one letter of one word.

Of a prompt of a few words, one changed word changes most triples, so similarity does not see it.
Each prompt is indexed without each of its words (a deletion neighbourhood, as in SymSpell). A gap
that several words fill is the slot of a template, such as `where is my _`, and its words are
content. So are numbers. Memory holds the indexed prompts, and a few rows a gap.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ft_assets.data.texts import Text, hashed, word_key

LEAST, MOST = 4, 32  # units of a short prompt
FILLERS = 4  # distinct words in a gap that make it a slot
KEPT = 200  # rows that wait for the decision on a gap
SCATTERED = 0.6  # share of a prompt's gaps that other words fill
MANY = 6  # units of a prompt to which a word in the middle may be added
LAST = 9  # units of a prompt below which its last one is its subject: the capital of _
TYPO = 4  # letters of a word in which one may be wrong
_NUMBER = re.compile(r"[\d.,]+")
RowName = tuple[str, str]  # (side, id)
_MASK = 2**64 - 1
_MULTIPLIER = 0x9E3779B97F4A7C15


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
        self._whole: dict[int, tuple[int, ...]] = {}  # numbers of prompts
        self._without: dict[int, tuple[int, ...]] = {}  # without one unit
        self._gaps: dict[int, _Gap] = {}  # those that a row fills

    def add(self, identity: str, text: Text) -> None:
        if not LEAST <= len(text.units) <= MOST:
            return
        number = len(self._prompts)
        self._prompts.append((identity, text.units))
        whole, without = _keys(text)
        self._whole[whole] = (*self._whole.get(whole, ()), number)
        for key in set(without):
            self._without[key] = (*self._without.get(key, ()), number)

    def matches(self, row: RowName, text: Text) -> Iterator[tuple[str, float]]:
        """Yield (id, similarity) of prompts with a misspelt, an additional, or a missing word."""
        count = len(text.units)
        if not self._prompts or not LEAST - 1 <= count <= MOST + 1:
            return
        whole, without = _keys(text)
        found = [
            number
            for number in self._without.get(whole, ())
            if _may_be_added(self._prompts[number][1], text.units)
        ]
        for place, key in enumerate(without):
            for number in self._whole.get(key, ()):
                if _may_be_added(text.units, self._prompts[number][1]):
                    found.append(number)
            found += self._filled(row, text.units, place, key)
        for number in found:
            yield self._prompts[number][0], 1 - 1 / max(count, LEAST)

    def _filled(self, row: RowName, units: list[str], place: int, key: int) -> Iterator[int]:
        """Note that a row fills a gap; yield the prompts of which it is a misspelling."""
        for number in self._without.get(key, ()):
            identity, others = self._prompts[number]
            same = others[:place] == units[:place] and others[place + 1 :] == units[place + 1 :]
            if not same or identity == row[1] or others[place] == units[place]:
                continue
            if self._misspelt(units[place], others[place]):
                yield number
            gap = self._gaps.setdefault(_mixed(key, place), _Gap())
            gap.fillers |= {units[place], others[place]}
            if len(gap.waiting) < KEPT:
                gap.waiting.append((row, units[place]))

    def decided(self) -> Iterator[tuple[RowName, str, float]]:
        """Yield (row, id, similarity) of the rows with another word in a gap that is no slot."""
        known = frozenset(self.slots)
        for identity, units in self._prompts:
            names = [
                _mixed(key, place)
                for place, key in enumerate(_keys_of_hashes(hashed(units).tolist())[1])
            ]
            filled = [place for place, name in enumerate(names) if name in self._gaps]
            # Words that change in most places are a paraphrase's, and no slot's.
            scattered = len(filled) >= max(LEAST, SCATTERED * len(names))
            for place in filled:
                if place == len(units) - 1 < LAST:
                    continue
                gap = self._gaps[names[place]]
                if names[place] in known or (len(gap.fillers) >= FILLERS and not scattered):
                    self.slots.add(names[place])
                    continue
                for row, word in gap.waiting:
                    if word != units[place] and not _differ_in_number(word, units[place]):
                        yield row, identity, 1 - 1 / len(names)

    def _misspelt(self, one: str, other: str) -> bool:
        if min(len(one), len(other)) < TYPO or _differ_in_number(one, other):
            return False
        known = all(word_key(word) in self._words for word in (one, other))
        return not known and _one_letter_apart(one, other)


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


def _keys(text: Text) -> tuple[int, list[int]]:
    """Return the hash of a prompt, and its hash without the unit at each place."""
    return _keys_of_hashes(text.hashes.tolist())


def _keys_of_hashes(values: list[int]) -> tuple[int, list[int]]:
    count = len(values)
    before, after, power = [0], [0], [1]
    for value in values:
        before.append((before[-1] * _MULTIPLIER + value) & _MASK)
        power.append(power[-1] * _MULTIPLIER & _MASK)
    for place, value in enumerate(reversed(values)):
        after.append((value * power[place] + after[-1]) & _MASK)
    without = [
        (before[place] * power[count - 1 - place] + after[count - 1 - place]) & _MASK
        for place in range(count)
    ]
    return before[-1], without


def _mixed(key: int, place: int) -> int:
    return (key ^ (place + 1) * _MULTIPLIER) & _MASK
