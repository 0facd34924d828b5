"""Make preference pairs of a model's own answers, scored by the metric of the verdict. No torch.

The best answer is chosen and the worst rejected; where no answer is right, the reference is chosen.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ft_assets.config import EvaluationSettings, SamplingSettings
from ft_assets.evaluation.own_scores import OwnScores
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.metrics import Option
from ft_assets.metrics.registry import ROUNDING
from ft_assets.rows.types import Outcome, OwnAnswerRow, PairRow

CHOSEN, REJECTED = "chosen", "rejected"


class Sampled(Protocol):
    """A sampled answer; `ids` are its tokens with the stop token, if it `stopped`."""

    @property
    def text(self) -> str: ...
    @property
    def stopped(self) -> bool: ...
    @property
    def tokens(self) -> int: ...
    @property
    def ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Row:
    """A row with its samples. `prompt` and `reference_ids` are tokens."""

    row: ReferencedRow
    prompt: list[int]
    reference_ids: list[int]
    samples: Sequence[Sampled]


@dataclass(frozen=True)
class Scored:
    """A distinct answer. `value` is the score with its sign, so that higher is better."""

    ids: tuple[int, ...]
    text: str
    times: int
    stopped: bool
    score: float
    value: float
    right: bool


@dataclass(frozen=True)
class Judged:
    """What a row's answers are worth: the distinct answers, the outcome, and its pair if any."""

    row: Row
    answers: list[Scored]
    outcome: Outcome
    chosen: Scored | None = None
    rejected: Scored | None = None

    def pair(self) -> PairRow | None:
        """Return the row's pair, in the layout of heldout_split's."""
        if self.chosen is None or self.rejected is None:
            return None
        row = self.row.row
        pair: PairRow = {
            "id": row["id"],
            "group": row["group"],
            "messages": row["messages"][:-1],
            "chosen": self.chosen.text,
            "rejected": self.rejected.text,
            "prompt_ids": self.row.prompt,
            "chosen_ids": list(self.chosen.ids),
            "rejected_ids": list(self.rejected.ids),
        }
        if "stratum" in row:
            pair["stratum"] = row["stratum"]
        if "tools" in row:
            pair["tools"] = row["tools"]
        return pair

    def table(self, side: str, outcome: Outcome) -> list[OwnAnswerRow]:
        """Return the distinct answers as rows of the table to look at."""
        paired = {CHOSEN: self.chosen, REJECTED: self.rejected}
        return [
            {
                "id": self.row.row["id"],
                "side": side,
                "prompt": self.row.row["messages"][-2]["content"] if self._asks() else "",
                "reference": self.row.row["reference"],
                "answer": one.text,
                "times": one.times,
                "tokens": len(one.ids),
                "stopped": one.stopped,
                "score": one.score,
                "right": one.right,
                "used": next((name for name, used in paired.items() if used is one), "")
                if outcome in ("own", "reference")
                else "",
                "outcome": outcome,
            }
            for one in self.answers
        ]

    def _asks(self) -> bool:
        return len(self.row.row["messages"]) > 1


class Judge:
    """Scores sampled answers by `evaluation.metric`, and chooses the pair of each row.

    schema: the parsed `evaluation.json_schema`. root: the folder of finetune.yaml.
    """

    def __init__(
        self, settings: EvaluationSettings, sampling: SamplingSettings, schema: Option, root: Path
    ) -> None:
        self.sampling, self.metric = sampling, settings.main_metric()
        self.scores = OwnScores(settings, schema, root)

    def judge(self, rows: Sequence[Row]) -> list[Judged]:
        """Return what the answers of each row are worth. Raises EvaluationError of the metric."""
        counted = [_distinct(row.samples) for row in rows]
        texts = [
            (row.row, one.text) for row, ones in zip(rows, counted, strict=True) for one in ones
        ]
        references = [(row.row, row.row["reference"]) for row in rows]
        scores = iter(self.scores.of(self.metric, [*texts, *references]))
        own = [[next(scores) for _ in ones] for ones in counted]
        return [
            self._choose(row, ones, values, reference)
            for row, ones, values, reference in zip(rows, counted, own, scores, strict=True)
        ]

    def _choose(
        self, row: Row, answers: Sequence["_Counted"], scores: list[float], reference: float
    ) -> Judged:
        sign = 1 if self.metric.higher_is_better else -1
        accept = reference if self.sampling.accept is None else self.sampling.accept
        found = [
            Scored(
                ids=one.ids,
                text=one.text,
                times=one.times,
                stopped=one.stopped,
                score=score,
                value=sign * score,
                right=one.stopped and sign * (score - accept) >= -ROUNDING,
            )
            for one, score in zip(answers, scores, strict=True)
        ]
        finished = [one for one in found if one.stopped]
        if not finished:
            return Judged(row, found, "unfinished")
        best = max(finished, key=lambda one: (one.value, one.times))
        worst = min(finished, key=lambda one: (one.value, -one.times))
        if best.right and best.value == worst.value:
            return Judged(row, found, "alike")
        outcome: Outcome = "own"
        if not best.right:
            text = row.row["reference"]
            best = Scored(
                tuple(row.reference_ids), text, 0, True, reference, sign * reference, True
            )
            outcome = "reference"
        if best.value - worst.value <= self.sampling.margin:
            return Judged(row, found, "no margin")
        return Judged(row, found, outcome, best, worst)


@dataclass(frozen=True)
class _Counted:
    ids: tuple[int, ...]
    text: str
    times: int
    stopped: bool


def _distinct(samples: Sequence[Sampled]) -> list[_Counted]:
    """Return the distinct answers, the first sampled one first."""
    times = Counter((one.ids, one.text, one.stopped) for one in samples)
    return [_Counted(ids, text, count, stopped) for (ids, text, stopped), count in times.items()]
