"""Ask a model behind an endpoint for the held-out rows, within limits of money and time."""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import JsonValue

from ft_assets.config import EndpointRival, EvaluationSettings
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.kept_answers import digest
from ft_assets.evaluation.rival_answers import KeptAnswers, Question, RivalAnswer, Tried, price_of
from ft_assets.job import Report
from ft_assets.metrics.endpoint import Reply, ask

EVERY = 20  # rows between two lines of progress


class Asked:
    """One rival: what is sent to it, and what it has cost so far."""

    def __init__(self, name: str, settings: EndpointRival, evaluation: EvaluationSettings) -> None:
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


def ask_endpoint(
    rival: Asked,
    questions: Sequence[Question],
    kept: KeptAnswers,
    tried: Tried,
    report: Report,
) -> list[RivalAnswer]:
    """Return the answers to all questions. Raises EvaluationError at the first that fails."""
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

    def one(question: Question) -> RivalAnswer:
        nonlocal done
        if failed:  # no further money for a step that fails
            raise failed[0]
        if known := kept.get(rival.key(question.messages)):
            return known.model_copy(update={"rival": rival.name, "id": question.id})
        try:
            if time.monotonic() > end:
                raise _late(rival)
            answer = rival.answer(question.id, question.messages)
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
        found = list(pool.map(one, questions))
    report(
        f"asked {rival.name}", answers=done, kept=len(questions) - done, cost=round(rival.cost, 6)
    )
    return found


def _late(rival: Asked) -> EvaluationError:
    return EvaluationError(
        where=f"evaluation.rivals.{rival.name}",
        found=f"not all rows were answered within {rival.settings.max_minutes:g} minutes",
        expected="all rows answered within max_minutes",
        fix="raise max_minutes or parallel; the answers so far are kept",
    )
