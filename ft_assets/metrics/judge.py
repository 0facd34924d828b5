"""An LLM judge behind any OpenAI-compatible endpoint: it compares two answers in both orders.

A judge prefers the first answer more often than it should (Zheng et al. 2023, section 3.3), so a
win counts only if it holds in both orders: 1 for two wins, 0 for two losses, else ½. The base's own
score is ½ by definition, so a candidate with a mean above ½ wins more often than it loses.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ft_assets.errors import EvaluationError
from ft_assets.metrics.registry import Metric
from ft_assets.redaction import redacted
from ft_assets.rows.types import Message

INSTRUCTION = (
    "You compare two answers to the same conversation. {criteria}\n"
    "Judge the content alone, not the order or the length. "
    "Reply with exactly one word: A, B or TIE."
)
PARALLEL = 4
LARGEST_ANSWER = 1 << 20  # bytes; a verdict is one word
SHOWN = 300
Orders = Counter[tuple[str, str]]  # the replies to a pair: in its first order, and in the other


class JudgeSettings(BaseModel):
    """A judge: any OpenAI-compatible chat endpoint.

    It compares a candidate's answer with the base's, in both orders.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base_url: str = Field(description="e.g. https://api.openai.com/v1, or http://127.0.0.1:8000/v1")
    model: str
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Name of the environment variable that holds the key.",
    )
    criteria: str = Field(
        default="Which answer serves the user better?", description="The question to the judge."
    )
    timeout: float = Field(
        default=60,
        gt=0,
        le=86_400,
        description="Limit of a whole request in seconds, until the last byte of its answer.",
    )

    @field_validator("base_url")
    @classmethod
    def _no_secret(cls, value: str) -> str:
        if redacted(value) != value:
            raise ValueError("holds a user or a query; the key is in the variable api_key_env")
        return value


@Metric("judge", config="judge", of_answer=False)
def judge_scores(
    settings: JudgeSettings,
    ids: list[str],
    conversations: Sequence[Sequence[Message]],
    answers: list[str],
    rivals: list[str],
    orders: Orders | None = None,
) -> list[float]:
    """Score 1, ½ or 0 for each row: the answer against the rival's.

    orders: counts the replies to each pair that was asked. Raises EvaluationError with the id of
    the row at which the judge failed.
    """

    def replies(index: int) -> tuple[str, str] | None:
        if answers[index] == rivals[index]:
            return None
        first = _ask(settings, ids[index], conversations[index], answers[index], rivals[index])
        second = _ask(settings, ids[index], conversations[index], rivals[index], answers[index])
        return first, second

    with ThreadPoolExecutor(PARALLEL) as pool:
        given = list(pool.map(replies, range(len(ids))))
    if orders is not None:
        orders.update(pair for pair in given if pair)
    return [{("A", "B"): 1.0, ("B", "A"): 0.0}.get(pair or ("", ""), 0.5) for pair in given]


def _ask(
    settings: JudgeSettings, row: str, conversation: Sequence[Message], left: str, right: str
) -> str:
    turns = "\n".join(f"{turn['role']}: {turn['content']}" for turn in conversation)
    text = f"[Conversation]\n{turns}\n\n[Answer A]\n{left}\n\n[Answer B]\n{right}"
    messages = [
        {"role": "system", "content": INSTRUCTION.format(criteria=settings.criteria)},
        {"role": "user", "content": text},
    ]
    reply = str(_post(settings, row, messages)).strip().strip(".*\"'").upper()
    if reply not in ("A", "B", "TIE"):
        raise EvaluationError(
            where=f"evaluation.judge, row {row}",
            found=f"the judge replied {reply[:80]!r}",
            expected="one word: A, B or TIE",
            fix="use a stronger judge",
        )
    return reply


def _post(settings: JudgeSettings, row: str, messages: list[dict[str, str]]) -> Any:
    # httpx and not the hub's client, which refuses any address while HF_HUB_OFFLINE is set.
    import httpx

    body = {"model": settings.model, "temperature": 0, "max_tokens": 8, "messages": messages}
    headers = _authorization(settings)
    try:
        text = asyncio.run(_answer(settings, body, headers))
        return json.loads(text)["choices"][0]["message"]["content"]
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        TimeoutError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        RecursionError,  # of an answer that is nested thousands of times
    ) as error:
        late = isinstance(error, TimeoutError | httpx.TimeoutException)
        why = f"no whole answer within {settings.timeout:g} s" if late else str(error)
        raise EvaluationError(
            where=f"evaluation.judge, row {row}",
            found=f"{settings.base_url} failed ({type(error).__name__}: {why[:SHOWN]})",
            expected="an OpenAI-compatible /chat/completions",
            fix="check base_url, model, key and timeout; a failed judgement is never a score",
        ) from None


async def _answer(
    settings: JudgeSettings, body: dict[str, Any], headers: dict[str, str]
) -> bytearray:
    """Return the bytes of an answer. Raises TimeoutError, ValueError, and httpx's errors.

    The time limit is one of the whole request. httpx has limits of single reads only, which a
    server that sends a byte a second never exceeds.
    """
    import httpx

    url, received = f"{settings.base_url.rstrip('/')}/chat/completions", bytearray()
    async with (
        asyncio.timeout(settings.timeout),
        httpx.AsyncClient(timeout=settings.timeout) as client,
        client.stream("POST", url, json=body, headers=headers) as response,
    ):
        response.raise_for_status()
        async for part in response.aiter_bytes():
            received += part
            if len(received) > LARGEST_ANSWER:
                raise ValueError(f"its answer has more than {LARGEST_ANSWER} bytes")
    return received


def _authorization(settings: JudgeSettings) -> dict[str, str]:
    if not settings.api_key_env:
        return {}
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise EvaluationError(
            where="evaluation.judge.api_key_env",
            found=f"{settings.api_key_env} is not set",
            expected="the judge's key in this environment variable",
            fix=f"export {settings.api_key_env}=…",
        )
    return {"Authorization": f"Bearer {key}"}
