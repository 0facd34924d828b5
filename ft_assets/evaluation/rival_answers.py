"""The answers of rivals to the held-out rows, as files, and what they cost.

An answer is kept under the digest of all that decides it. Answers of earlier versions, of other
base models of the project, and of a try that failed half way are not asked again.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from ft_assets.artifacts.line_file import LineFile
from ft_assets.config import BaseRival, EndpointRival
from ft_assets.evaluation.kept_answers import AskedRow, GivenAnswer
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.report_model import RivalCost
from ft_assets.rows.types import Message

TABLE, COSTS = "rivals.parquet", "costs.json"
MILLION = 1_000_000


class RivalAnswer(BaseModel):
    """A rival's answer to a row. key: the digest of what decides it.

    seconds: of the request, or a batch's time by its rows; None where the graph had the answer.
    """

    model_config = ConfigDict(frozen=True)

    rival: str
    id: str
    key: str
    text: str
    stopped: bool
    tokens_in: int | None
    tokens_out: int | None
    seconds: float | None
    model: str | None


KeptAnswers = Mapping[str, RivalAnswer]  # by digest


@dataclass(frozen=True)
class Question:
    """What a rival is sent for a row."""

    id: str
    messages: list[Message]


class LocalBase(BaseModel):
    """A base model of the graph: its snapshot, the identity of its weights, its last answers.

    version: as the step `answers` digests it, so that an answer that one of them has is not
    generated again. answers: the folder of the artifact `answers`, None if there is none.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    snapshot: Path
    version: str
    answers: Path | None = None


def read_answers(table: Path) -> list[RivalAnswer]:
    """Read the answers of all rivals."""
    return [RivalAnswer.model_validate(line) for line in pq.read_table(table).to_pylist()]


def given_answers(table: Path) -> dict[str, GivenAnswer]:
    """Return the answers of all rivals as a model's own, by their digests; {} without a table."""
    if not table.exists():
        return {}
    return {
        one.key: GivenAnswer(one.text, one.stopped, one.tokens_out or 0, one.key)
        for one in read_answers(table)
    }


def write_answers(table: Path, answers: Sequence[RivalAnswer]) -> None:
    """Write the answers as one table."""
    columns = {
        "rival": pa.string(),
        "id": pa.string(),
        "key": pa.string(),
        "text": pa.string(),
        "stopped": pa.bool_(),
        "tokens_in": pa.int64(),
        "tokens_out": pa.int64(),
        "seconds": pa.float64(),
        "model": pa.string(),
    }
    lines = [answer.model_dump() for answer in answers]
    pq.write_table(pa.Table.from_pylist(lines, schema=pa.schema(list(columns.items()))), table)


class Tried:
    """The answers of a step that has not ended: a file that a later try reads."""

    def __init__(self, file: Path) -> None:
        self._lines = LineFile(file)

    def read(self) -> list[RivalAnswer]:
        """Return the answers."""
        return [RivalAnswer.model_validate_json(line) for line in self._lines.read()]

    def add(self, answer: RivalAnswer) -> None:
        """Append an answer."""
        self._lines.add([answer.model_dump_json()])


def price_of(answer: RivalAnswer, settings: EndpointRival) -> float | None:
    """Return what an answer costs, None if a price or a count of tokens is not known."""
    prices = (settings.price_in, settings.price_out)
    counts = (answer.tokens_in, answer.tokens_out)
    if None in prices or None in counts:
        return None
    pairs = zip(counts, prices, strict=True)
    return sum(float(count or 0) * (price or 0.0) for count, price in pairs) / MILLION


def asked_rows(answers: Iterable[RivalAnswer], rows: Sequence[ReferencedRow]) -> list[AskedRow]:
    """Return a rival's answers in the form that candidates' have; their losses are not known."""
    of = {answer.id: answer for answer in answers}
    return [
        AskedRow(
            row["id"],
            row["reference"],
            math.nan,
            math.nan,
            GivenAnswer(one.text, one.stopped, one.tokens_out or 0, one.key),
        )
        for row in rows
        for one in [of[row["id"]]]
    ]


def cost_of(answers: Sequence[RivalAnswer], rival: EndpointRival | BaseRival) -> RivalCost:
    """Return price and latency of the answers of a rival, which an endpoint or a base gave."""
    seconds = sorted(answer.seconds for answer in answers if answer.seconds is not None)
    endpoint = rival if isinstance(rival, EndpointRival) else None
    prices = [price_of(answer, endpoint) if endpoint else None for answer in answers]
    known = [price for price in prices if price is not None]
    return RivalCost(
        model=rival.model if isinstance(rival, EndpointRival) else rival.base_model,
        per_thousand=1000 * statistics.fmean(known) if len(known) == len(prices) else None,
        seconds=statistics.median(seconds) if seconds else None,
        seconds_p95=seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else None,
    )


def read_costs(file: Path) -> dict[str, RivalCost]:
    """Read costs.json."""
    return {
        name: RivalCost.model_validate(cost) for name, cost in json.loads(file.read_text()).items()
    }


def costs_json(costs: Mapping[str, RivalCost]) -> str:
    """Return the text of costs.json."""
    return json.dumps({name: cost.to_dict() for name, cost in costs.items()}, indent=1)
