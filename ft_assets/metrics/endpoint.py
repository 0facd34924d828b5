"""A chat endpoint that speaks OpenAI's protocol: an API, vLLM, Ollama, llama.cpp, `ft serve`."""

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from ft_assets.errors import EvaluationError
from ft_assets.redaction import redacted

LARGEST_ANSWER = 1 << 20  # bytes
SHOWN = 300
# Statuses that may pass: too early, too many requests, and a server that is not ready.
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LONGEST_PAUSE = 60.0  # seconds between two tries


class Endpoint(BaseModel):
    """Any OpenAI-compatible chat endpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base_url: str = Field(description="e.g. https://api.openai.com/v1, or http://127.0.0.1:8000/v1")
    model: str
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Name of the environment variable that holds the key.",
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


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    text: None if the message has no text. finish: why it ended, e.g. `stop` or `length`. model: the
    name that the endpoint reports. tokens_in, tokens_out: as the endpoint counts them, None if it
    does not. seconds: of the last try.
    """

    text: str | None
    finish: str | None
    model: str | None
    tokens_in: int | None
    tokens_out: int | None
    seconds: float


def ask(
    endpoint: Endpoint,
    where: str,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, JsonValue],
    tries: int = 1,
) -> Reply:
    """Post one conversation and return the reply.

    where: the place for messages, `SECTION, row ID`. options: further fields of the body. tries:
    how often to ask while a status may pass, with the pause that the endpoint asks for. Raises
    EvaluationError if there is no whole answer: a failed request is never an answer.
    """
    import httpx  # not the hub's client, which refuses any address while HF_HUB_OFFLINE is set

    body = {"model": endpoint.model, "messages": list(messages), **options}
    headers = _authorization(endpoint, where.partition(",")[0])
    for left in reversed(range(tries)):
        begun = time.monotonic()
        try:
            text = asyncio.run(_answer(endpoint, body, headers))
            return _reply(json.loads(text), time.monotonic() - begun)
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
            if left and (pause := _pause(error, tries - left)) is not None:
                time.sleep(pause)
                continue
            raise _failed(endpoint, where, error) from None
    raise AssertionError("tries is at least 1")


def _pause(error: Exception, tried: int) -> float | None:
    """Return the seconds to wait before the next try, None if another try is of no use."""
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        if error.response.status_code not in PASSING:
            return None
        asked = error.response.headers.get("retry-after", "")
        if asked.isdecimal():
            return min(float(asked), LONGEST_PAUSE)
    elif not isinstance(error, httpx.TransportError | TimeoutError):
        return None
    return min(2.0 ** (tried - 1), LONGEST_PAUSE)


def _failed(endpoint: Endpoint, where: str, error: Exception) -> EvaluationError:
    import httpx

    late = isinstance(error, TimeoutError | httpx.TimeoutException)
    why = f"no whole answer within {endpoint.timeout:g} s" if late else str(error)
    return EvaluationError(
        where=where,
        found=f"{endpoint.base_url} failed ({type(error).__name__}: {why[:SHOWN]})",
        expected="an OpenAI-compatible /chat/completions",
        fix="check base_url, model, key and timeout; a failed request is never a score",
    )


def _reply(answer: Any, seconds: float) -> Reply:
    """Read the body of an answer. Raises KeyError, IndexError, TypeError, ValueError."""
    choice = answer["choices"][0]
    usage = answer.get("usage") or {}
    return Reply(
        text=choice["message"]["content"],
        finish=choice.get("finish_reason"),
        model=answer.get("model"),
        tokens_in=usage.get("prompt_tokens"),
        tokens_out=usage.get("completion_tokens"),
        seconds=seconds,
    )


async def _answer(endpoint: Endpoint, body: dict[str, Any], headers: dict[str, str]) -> bytearray:
    """Return the bytes of an answer. Raises TimeoutError, ValueError, and httpx's errors.

    The time limit is one of the whole request. httpx has limits of single reads only, which a
    server that sends a byte a second never exceeds.
    """
    import httpx

    url, received = f"{endpoint.base_url.rstrip('/')}/chat/completions", bytearray()
    async with (
        asyncio.timeout(endpoint.timeout),
        httpx.AsyncClient(timeout=endpoint.timeout) as client,
        client.stream("POST", url, json=body, headers=headers) as response,
    ):
        response.raise_for_status()
        async for part in response.aiter_bytes():
            received += part
            if len(received) > LARGEST_ANSWER:
                raise ValueError(f"its answer has more than {LARGEST_ANSWER} bytes")
    return received


def _authorization(endpoint: Endpoint, section: str) -> dict[str, str]:
    if not endpoint.api_key_env:
        return {}
    key = os.environ.get(endpoint.api_key_env)
    if not key:
        raise EvaluationError(
            where=f"{section}.api_key_env",
            found=f"{endpoint.api_key_env} is not set",
            expected="the endpoint's key in this environment variable",
            fix=f"export {endpoint.api_key_env}=…",
        )
    return {"Authorization": f"Bearer {key}"}
