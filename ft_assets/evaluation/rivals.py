"""Ask models behind endpoints for the held-out rows, and keep what they answered and its cost.

An answer is kept under the digest of all that decides it. Answers of earlier versions, of other
base models of the project, and of a try that failed half way are not asked again.
"""

import json
import math
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, JsonValue

from ft_assets.artifacts.line_file import LineFile
from ft_assets.config import EvaluationSettings, RivalSettings
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.kept_answers import AskedRow, GivenAnswer, digest
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.report_model import RivalCost
from ft_assets.job import Report
from ft_assets.metrics.endpoint import Reply, ask
from ft_assets.rows.types import TokenizedRow

TABLE, COSTS = "rivals.parquet", "costs.json"
EVERY = 20  # rows between two lines of progress
MILLION = 1_000_000


class RivalAnswer(BaseModel):
    """A rival's answer to a row. key: the digest of what decides it."""

    model_config = ConfigDict(frozen=True)

    rival: str
    id: str
    key: str
    text: str
    stopped: bool
    tokens_in: int | None
    tokens_out: int | None
    seconds: float
    model: str | None


Kept = dict[str, RivalAnswer]  # by digest


def read_answers(table: Path) -> list[RivalAnswer]:
    """Read the answers of all rivals."""
    return [RivalAnswer.model_validate(line) for line in pq.read_table(table).to_pylist()]


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


class Rival:
    """One rival: what is sent to it, and what it has cost so far."""

    def __init__(self, name: str, settings: RivalSettings, evaluation: EvaluationSettings) -> None:
        self.name, self.settings = name, settings
        wanted: dict[str, JsonValue] = {
            "temperature": 0,
            "seed": evaluation.seed,
            "max_tokens": evaluation.max_new_tokens,
            **settings.options,
        }
        self.options = {key: value for key, value in wanted.items() if value is not None}
        self.cost = 0.0
        self._lock = threading.Lock()  # of the cost, which all requests add to

    def key(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the digest of all that decides an answer."""
        settings = self.settings
        return digest(settings.base_url, settings.model, self.options, list(messages))

    def answer(self, row: str, messages: Sequence[Mapping[str, Any]]) -> RivalAnswer:
        """Ask for one row. Raises EvaluationError if the endpoint fails or the money is spent."""
        where = f"evaluation.rivals.{self.name}, row {row}"
        self._require_money(where)
        reply = ask(self.settings, where, messages, self.options, self.settings.tries)
        return self._counted(
            RivalAnswer(
                rival=self.name,
                id=row,
                key=self.key(messages),
                text=self._text(reply, where),
                stopped=reply.finish == "stop",
                tokens_in=reply.tokens_in,
                tokens_out=reply.tokens_out,
                seconds=reply.seconds,
                model=reply.model,
            ),
            where,
        )

    def _require_money(self, where: str) -> None:
        limit = self.settings.max_cost
        if limit is not None and self.cost >= limit:
            raise EvaluationError(
                where=where,
                found=f"the answers cost {self.cost:.4g} so far",
                expected=f"at most max_cost: {limit:g}",
                fix="raise max_cost, or hold out fewer rows; the answers so far are kept",
            )

    def _text(self, reply: Reply, where: str) -> str:
        expected = self.settings.reported_model or self.settings.model
        if reply.model and not _same_model(reply.model, expected):
            raise EvaluationError(
                where=where,
                found=f"the endpoint answered with the model {reply.model!r}",
                expected=f"{expected!r}",
                fix=f"correct `model`, or write reported_model: {reply.model} if it is the same",
            )
        if reply.text is None or reply.finish not in ("stop", "length"):
            raise EvaluationError(
                where=where,
                found=f"the answer ended by {reply.finish!r} "
                + ("without a text" if reply.text is None else "before its end"),
                expected="a text that ends by `stop` or `length`",
                fix="leave out the row, or the rival",
            )
        return reply.text

    def _counted(self, answer: RivalAnswer, where: str) -> RivalAnswer:
        price = price_of(answer, self.settings)
        if price is None and self.settings.max_cost is not None:
            raise EvaluationError(
                where=where,
                found="the endpoint does not report how many tokens it counted",
                expected="`usage`, because max_cost is set",
                fix="leave out max_cost, and set a limit at the provider",
            )
        with self._lock:
            self.cost += price or 0.0
        return answer


def _same_model(reported: str, expected: str) -> bool:
    """Return True for a name that dates the asked one, e.g. `gpt-4o-2024-08-06`, or its file."""
    short = expected.rpartition("/")[2]
    return reported.rpartition("/")[2].startswith(short)


def price_of(answer: RivalAnswer, settings: RivalSettings) -> float | None:
    """Return what an answer costs, None if a price or a count of tokens is not known."""
    prices = (settings.price_in, settings.price_out)
    counts = (answer.tokens_in, answer.tokens_out)
    if None in prices or None in counts:
        return None
    pairs = zip(counts, prices, strict=True)
    return sum(float(count or 0) * (price or 0.0) for count, price in pairs) / MILLION


def prompt_of(row: TokenizedRow, settings: RivalSettings) -> list[dict[str, str]]:
    """Return the turns that are sent: those before the answer, with the rival's own system turn."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"][:-1]]
    if settings.prompt is None:
        return turns
    own = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": settings.prompt}, *own]


def require_text(rows: Iterable[TokenizedRow]) -> None:
    """Raise EvaluationError if a row has tools: its answer is not a text alone."""
    for row in rows:
        if row.get("tools") or any(turn.get("tool_calls") for turn in row["messages"]):
            raise EvaluationError(
                where=f"evaluation.rivals, held-out row {row['id']}",
                found="it has tools, or calls of tools",
                expected="rows whose turns and answers are texts",
                fix="leave out evaluation.rivals",
            )


def ask_rivals(
    rows: Sequence[TokenizedRow],
    settings: EvaluationSettings,
    kept: Kept,
    tried: Tried,
    report: Report,
) -> list[RivalAnswer]:
    """Ask each rival for each row once. Raises EvaluationError at the first that fails."""
    require_text(rows)
    given: list[RivalAnswer] = []
    for name, rival in settings.rivals.items():
        given += _ask_one(Rival(name, rival, settings), rows, kept, tried, report)
    return given


def _ask_one(
    rival: Rival, rows: Sequence[TokenizedRow], kept: Kept, tried: Tried, report: Report
) -> list[RivalAnswer]:
    end = time.monotonic() + rival.settings.max_minutes * 60
    done = 0
    lock = threading.Lock()
    # What an earlier try of this step paid counts too, or each try could spend max_cost.
    rival.cost = sum(
        price_of(answer, rival.settings) or 0.0
        for answer in tried.read()
        if answer.rival == rival.name
    )
    failed: list[EvaluationError] = []

    def one(row: TokenizedRow) -> RivalAnswer:
        nonlocal done
        if failed:  # no further money for a step that fails
            raise failed[0]
        messages = prompt_of(row, rival.settings)
        if known := kept.get(rival.key(messages)):
            return known.model_copy(update={"rival": rival.name, "id": row["id"]})
        try:
            if time.monotonic() > end:
                raise _late(rival)
            answer = rival.answer(row["id"], messages)
        except EvaluationError as error:
            failed.append(error)
            raise
        tried.add(answer)
        with lock:
            done += 1
            if done % EVERY == 0:
                report(f"asked {rival.name}", answers=done, cost=round(rival.cost, 6))
        return answer

    with ThreadPoolExecutor(rival.settings.parallel) as pool:
        found = list(pool.map(one, rows))
    report(f"asked {rival.name}", answers=done, kept=len(rows) - done, cost=round(rival.cost, 6))
    return found


def _late(rival: Rival) -> EvaluationError:
    return EvaluationError(
        where=f"evaluation.rivals.{rival.name}",
        found=f"not all rows were answered within {rival.settings.max_minutes:g} minutes",
        expected="all rows answered within max_minutes",
        fix="raise max_minutes or parallel; the answers so far are kept",
    )


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


def cost_of(answers: Sequence[RivalAnswer], settings: RivalSettings) -> RivalCost:
    """Return price and latency of a rival's answers."""
    seconds = sorted(answer.seconds for answer in answers)
    prices = [price_of(answer, settings) for answer in answers]
    known = [price for price in prices if price is not None]
    whole = len(known) == len(prices)
    return RivalCost(
        model=settings.model,
        per_thousand=1000 * statistics.fmean(known) if whole else None,
        seconds=statistics.median(seconds),
        seconds_p95=seconds[math.ceil(0.95 * len(seconds)) - 1],
    )


def read_costs(file: Path) -> dict[str, RivalCost]:
    """Read costs.json."""
    return {
        name: RivalCost.model_validate(cost) for name, cost in json.loads(file.read_text()).items()
    }


def costs_json(costs: Mapping[str, RivalCost]) -> str:
    """Return the text of costs.json."""
    return json.dumps({name: cost.to_dict() for name, cost in costs.items()}, indent=1)
