"""Compare the held-out prompts with a sample of real ones (`data.production`).

Distinct prompts are compared; how often one occurs does not count. System turns are not part of a
compared text: logs often lack them, and their share on each side is told instead.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ft_assets.config import DataSettings
from ft_assets.data.leakage import clusters, texts
from ft_assets.data.tables import Table
from ft_assets.data.two_sample import Sampled, TwoSamples, compare
from ft_assets.data.units import units
from ft_assets.rows.types import MemberRow, TextRow

VERSION = "1"  # of the comparison
READ = 1000  # prompts of a side that are read
MOST = 500  # of a side that are compared
SHOWN = 8
SURE = 4.0  # standard errors by which the shares of a shown word differ
TRAINED = ("train", "validation", "preferences", "preferences_validation")


class Word(BaseModel):
    """A word, and the share of the prompts of each side that have it."""

    model_config = ConfigDict(frozen=True)

    word: str
    heldout: float
    production: float


class Unlike(BaseModel):
    """A prompt that reads as one of its own side only, the most typical first."""

    model_config = ConfigDict(frozen=True)

    id: str
    score: float
    text: str


class Production(BaseModel):
    """How held-out and production prompts differ; `test` is None if there are too few of them.

    `trained` and `held_out` count the production prompts that are also on these sides.
    """

    model_config = ConfigDict(frozen=True)

    heldout_prompts: int
    production_prompts: int
    trained: int
    held_out: int
    heldout_systems: float
    production_systems: float
    test: TwoSamples | None
    words: list[Word] = []
    only_production: list[Unlike] = []
    only_heldout: list[Unlike] = []


def production_of(split: Path, table: Path, data: DataSettings) -> Production:
    """Return how the held-out rows of a split differ from a table of production prompts."""
    heldout, production = _prompts(texts(split / "heldout.parquet")), _prompts(texts(table))
    some = [_some(heldout), _some(production)]
    names = clusters([row for rows in some for row in rows], data)
    first, second = ([_sampled(row, names[row["id"]]) for row in rows] for rows in some)
    test = compare(first, second, MOST)
    groups = {row["group"] for row in production}
    trained = set[str]()
    for side in TRAINED:
        path = split / f"{side}.parquet"
        trained |= {row["group"] for row in Table[MemberRow](path, ["group"])} & groups
    return Production(
        heldout_prompts=len(heldout),
        production_prompts=len(production),
        trained=len(trained),
        held_out=len({row["group"] for row in heldout} & groups),
        heldout_systems=_systems(heldout),
        production_systems=_systems(production),
        test=test,
        words=_words(first, second),
        only_production=_unlike(second, test.scores[1], 1) if test else [],
        only_heldout=_unlike(first, test.scores[0], -1) if test else [],
    )


def _prompts(rows: Iterable[TextRow]) -> list[TextRow]:
    """Return one row of each distinct prompt."""
    return list({row["group"]: row for row in rows}.values())


def _some(rows: Sequence[TextRow]) -> list[TextRow]:
    return sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest())[:READ]


def _sampled(row: TextRow, cluster: str) -> Sampled:
    turns = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
    said = [turn["content"] for turn in turns if turn["role"] != "system"]
    return Sampled(row["id"], "\n".join(said), len(said), cluster)


def _systems(rows: Sequence[TextRow]) -> float:
    having = sum(row["messages"][0]["role"] == "system" for row in rows)
    return having / len(rows) if rows else 0.0


def _words(first: Sequence[Sampled], second: Sequence[Sampled]) -> list[Word]:
    """Return the words whose shares differ most: first those of production, then of held-out."""
    if not first or not second:
        return []
    sides = [
        Counter(word for one in side for word in set(units(one.text))) for side in (first, second)
    ]
    found: list[tuple[float, Word]] = []
    for word in sides[0].keys() | sides[1].keys():
        shares = sides[0][word] / len(first), sides[1][word] / len(second)
        pooled = (sides[0][word] + sides[1][word]) / (len(first) + len(second))
        error = (pooled * (1 - pooled) * (1 / len(first) + 1 / len(second))) ** 0.5
        distance = (shares[1] - shares[0]) / error if error else 0.0
        if abs(distance) >= SURE:
            found.append((distance, Word(word=word, heldout=shares[0], production=shares[1])))
    found.sort(key=lambda entry: (-entry[0], entry[1].word))
    more = [word for distance, word in found if distance > 0][:SHOWN]
    return more + [word for distance, word in reversed(found) if distance < 0][:SHOWN]


def _unlike(texts: Sequence[Sampled], scores: dict[str, float], sign: int) -> list[Unlike]:
    rows = [
        Unlike(id=text.id, score=round(sign * scores[text.id], 3), text=text.text[:300])
        for text in texts
        if text.id in scores
    ]
    return sorted(rows, key=lambda row: (-row.score, row.id))[:SHOWN]
