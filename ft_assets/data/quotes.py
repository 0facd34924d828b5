"""Find texts that stand in other texts: long ones by their runs of words, short ones as a whole.

The score of a long text is the share of its runs of 13 units that a row repeats; Jaccard similarity
does not see a text that a long text quotes. The contamination of GPT-3 and later models was
measured so (Brown et al. 2020, appendix C). Of a very long text a fixed number of runs is compared,
those with the smallest hash: the share stays unbiased (Broder 1997). A short text must stand in a
row as a whole, and between the ends of sentences unless it has eight units.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ft_assets.data.texts import ANCHOR, Text

MIN_GRAMS = 5  # of a long text
MAX_GRAMS = 64
SENTENCES = 4  # that a quoted text has at most, if it has less than eight units
PLACES = 200  # of one beginning, in which a text is looked for that ends within a sentence
ENOUGH = 8  # units that need no ends of sentences


class GramIndex:
    """Finds the indexed long texts that a text repeats."""

    def __init__(self, share: float, common: frozenset[int]) -> None:
        self._share = share
        self._common = common
        self._owners: dict[int, list[int]] = {}
        self._texts: list[tuple[str, int]] = []  # (id, its grams)

    def add(self, identity: str, text: Text) -> bool:
        """Index a text. Return False if it is too short."""
        own = sorted(text.grams - self._common)[:MAX_GRAMS]
        if len(own) < MIN_GRAMS:
            return False
        for gram in own:
            self._owners.setdefault(gram, []).append(len(self._texts))
        self._texts.append((identity, len(own)))
        return True

    def matches(self, texts: Iterable[Text]) -> Iterator[tuple[str, float]]:
        """Yield (id, share of its grams) of the indexed texts that the texts repeat."""
        if not self._texts:
            return
        grams = frozenset[int]().union(*(text.grams for text in texts))
        hits = Counter(
            number for gram in grams & self._owners.keys() for number in self._owners[gram]
        )
        for number, count in hits.items():
            identity, total = self._texts[number]
            if count / total >= self._share:
                yield identity, count / total


@dataclass(frozen=True, eq=False)
class _Place:
    """A place in a text: where its anchor begins, or where a shorter text may stand."""

    identity: str
    text: Text
    start: int


class PhraseIndex:
    """Finds the indexed texts that stand in a text, and those in which a text stands."""

    def __init__(self) -> None:
        self._phrases: dict[int, list[_Place]] = {}
        self._places: dict[int, list[_Place]] = {}
        self._parts: dict[int, str] = {}  # {hash of one or more sentences: id}

    def add_phrase(self, identity: str, text: Text) -> None:
        """Index a text that may stand in others, by the run that the fewest others have."""
        if len(text) >= ANCHOR:
            used = [len(self._phrases.get(anchor, ())) for anchor in text.anchors]
            start = used.index(min(used))
            place = _Place(identity, text.without_units(), start)
            self._phrases.setdefault(text.anchors[start], []).append(place)

    def add_text(self, identity: str, text: Text) -> None:
        """Index a text in which others may stand."""
        anchors, breaks = text.anchors, sorted(text.breaks)
        slim = text.without_units()
        for number, start in enumerate(breaks):
            for end in breaks[number + 1 : number + 1 + SENTENCES]:
                if end - start >= ANCHOR:
                    self._parts.setdefault(text.part(start, end), identity)
            places = self._places.setdefault(anchors[start], []) if start < len(anchors) else []
            if len(places) < PLACES:
                places.append(_Place(identity, slim, start))

    def quoted(self, texts: Iterable[Text]) -> Iterator[str]:
        """Yield the ids of the phrases that stand in the texts."""
        for text in texts if self._phrases else ():
            for place, anchor in enumerate(text.anchors):
                for phrase in self._phrases.get(anchor, ()):
                    if _stands(phrase.text, text, place - phrase.start):
                        yield phrase.identity

    def quoting(self, phrase: Text) -> Iterator[str]:
        """Yield the ids of the indexed longer texts in which a phrase stands."""
        if len(phrase) >= ANCHOR:
            if (identity := self._parts.get(phrase.part(0, len(phrase)))) is not None:
                yield identity
            for place in self._places.get(phrase.anchors[0], ()):
                if _stands(phrase, place.text, place.start):
                    yield place.identity


def _stands(phrase: Text, text: Text, start: int) -> bool:
    if start < 0:
        return False
    end = start + len(phrase)
    whole = len(phrase) >= ENOUGH or {start, end} <= text.breaks
    return whole and bool(np.array_equal(text.hashes[start:end], phrase.hashes))
