"""Paired win rates of candidates by people, with intervals by prompt, and people's agreement."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from ft_assets.evaluation.report_model import Agreement, Part
from ft_assets.evaluation.scored_rows import PeopleScores
from ft_assets.review.judgements import Judgement, Relations
from ft_assets.review.session import BASE, CHAMPION, Item

PEOPLE = ("id", "answer", "rival", "score")  # columns of people.parquet
FILE = "people.parquet"
REVIEW = "review.json"


class WinRate(Part):
    """How often people prefer a candidate to a rival: the mean of 1, ½ for a tie, and 0.

    Prompts count once each, also if several people judged them. identical: the prompts with two
    equal answers, which are ties without a question.
    """

    candidate: str
    rival: str
    rate: float
    low: float
    high: float
    prompts: int
    wins: int
    ties: int
    losses: int
    identical: int

    def describe(self) -> str:
        """Return the rate as text."""
        return (
            f"{self.candidate} wins {self.rate:.0%} against {self.rival} "
            f"[{self.low:.0%}, {self.high:.0%}], {self.prompts} prompts"
        )


class HumanReview(Part):
    """review.json of `human_review`.

    prompts: how many were drawn. judged: of them, how many are judged for every candidate against
    the base. first_preferred: how often, of judgements with a preference, an answer that stood
    first was the best one: far from its share of places it shows that people did not read on.
    """

    prompts: int
    judged: int
    identical: int
    judgements: int
    reviewers: dict[str, int]
    win_rates: list[WinRate]
    agreement: Agreement | None
    first_preferred: float | None


def score(item: Item, relations: Relations, answer: str, rival: str) -> float | None:
    """Return the mean of people's 1, ½ and 0; ½ for equal answers; None if nobody judged them."""
    if answer == rival:
        return 0.5
    votes = relations.between(item.key, answer, rival).values()
    return statistics.fmean((1 + vote) / 2 for vote in votes) if votes else None


def win_rate(
    items: Sequence[Item],
    relations: Relations,
    candidate: str,
    rival: str,
    confidence: float,
    seed: int,
) -> WinRate | None:
    """Return the win rate over the judged prompts; None if nobody judged one."""
    from ft_assets.evaluation.verdict.statistics import interval

    both = [item for item in items if candidate in item.answers and rival in item.answers]
    known = [
        (item, score(item, relations, item.answers[candidate], item.answers[rival]))
        for item in both
    ]
    judged = [(item, value) for item, value in known if value is not None]
    identical = sum(item.answers[candidate] == item.answers[rival] for item, _ in judged)
    if len(judged) == identical:
        return None
    values = [value for _, value in judged]
    low, high = interval(values, confidence, seed, [item.cluster or item.key for item, _ in judged])
    return WinRate(
        candidate=candidate,
        rival=rival,
        rate=statistics.fmean(values),
        low=low,
        high=high,
        prompts=len(values),
        wins=sum(value > 0.5 for value in values),
        ties=sum(value == 0.5 for value in values),
        losses=sum(value < 0.5 for value in values),
        identical=identical,
    )


def is_judged(item: Item, relations: Relations) -> bool:
    """Return True if people judged every candidate of today against the base."""
    ours = [text for name, text in item.answers.items() if name not in (BASE, CHAMPION)]
    base = item.answers[BASE]
    return all(score(item, relations, text, base) is not None for text in ours)


def review(
    items: Sequence[Item], judgements: Sequence[Judgement], confidence: float, seed: int
) -> HumanReview:
    """Summarise the judgements of the drawn prompts."""
    from ft_assets.review.agreement import agreement  # scipy

    relations = Relations(judgements)
    keys = {item.key for item in items}
    its = [one for one in judgements if one.prompt_hash in keys]
    counts: dict[str, int] = {}
    for one in its:
        counts[one.reviewer] = counts.get(one.reviewer, 0) + 1
    names = dict.fromkeys(name for item in items for name in item.answers)
    rivals = [rival for rival in (BASE, CHAMPION) if rival in names]
    rates = [
        win_rate(items, relations, name, rival, confidence, seed)
        for rival in rivals
        for name in names
        if name not in (BASE, rival) and (name, rival) != (CHAMPION, BASE)
    ]
    return HumanReview(
        prompts=len(items),
        judged=sum(is_judged(item, relations) for item in items),
        identical=sum(len(item.distinct) == 1 for item in items),
        judgements=len(its),
        reviewers=dict(sorted(counts.items())),
        win_rates=[rate for rate in rates if rate is not None],
        agreement=agreement(_units(items, relations), confidence, seed),
        first_preferred=_first_preferred(its),
    )


def _units(items: Iterable[Item], relations: Relations) -> Mapping[str, list[list[int]]]:
    """Return people's values of each pair of different answers, by prompt group."""
    units: dict[str, list[list[int]]] = {}
    for item in items:
        texts = item.distinct
        for index, first in enumerate(texts):
            for second in texts[index + 1 :]:
                votes = relations.between(item.key, first, second)
                units.setdefault(item.cluster or item.key, []).append(list(votes.values()))
    return units


def _first_preferred(judgements: Sequence[Judgement]) -> float | None:
    best = [
        [answer.rank == 1 for answer in one.answers]
        for one in judgements
        if sum(answer.rank == 1 for answer in one.answers) == 1
    ]
    return statistics.fmean(places[0] for places in best) if best else None


def write_people_scores(
    path: Path, items: Mapping[str, Item], judgements: Sequence[Judgement]
) -> None:
    """Write a line for each row and judged pair of its answers, in both directions.

    items: by the id of a held-out row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    relations = Relations(judgements)
    columns: dict[str, list[str | float]] = {name: [] for name in PEOPLE}
    for row, item in items.items():
        for answer, rival in product(item.distinct, repeat=2):
            if (value := score(item, relations, answer, rival)) is not None:
                for column, cell in zip(PEOPLE, (row, answer, rival, value), strict=True):
                    columns[column].append(cell)
    text, number = pa.string(), pa.float64()
    schema = pa.schema(dict(zip(PEOPLE, (text, text, text, number), strict=True)))
    pq.write_table(pa.Table.from_pydict(columns, schema=schema), path)


def read_people_scores(path: Path) -> PeopleScores:
    """Return people's scores; none if there is no such file."""
    import pyarrow.parquet as pq

    if not path.exists():
        return {}
    with pq.ParquetFile(path) as table:
        lines = table.read().to_pylist()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for line in lines:
        its = found.setdefault(line["id"], {}).setdefault(line["answer"], {})
        its[line["rival"]] = line["score"]
    return found
