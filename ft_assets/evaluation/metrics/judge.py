"""An LLM judge behind any OpenAI-compatible endpoint: which of two answers is better, asked in both orders.

A judge prefers the first answer it sees more often than it should (Zheng et al. 2023, section 3.3), so that a win
counts only if it holds in both orders: 1 for two wins, 0 for two losses, ½ else. The base's own score is ½ by
definition, so that a candidate's mean above ½ means that it wins more often than it loses.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from ft_assets.config import JudgeSettings
from ft_assets.errors import EvaluationError

INSTRUCTION = (
    "You compare two answers to the same conversation. {criteria}\n"
    "Judge the content alone, not the order or the length. Reply with exactly one word: A, B or TIE."
)
PARALLEL = 4


def judge_scores(
    settings: JudgeSettings,
    ids: list[str],
    prompts: list[list[dict[str, str]]],
    answers: list[str],
    rivals: list[str],
) -> list[float]:
    """Return for each row 1, ½ or 0: the answer against the rival's. Raises EvaluationError naming the row the judge failed at."""

    def one(index: int) -> float:
        if answers[index] == rivals[index]:
            return 0.5
        first = _ask(settings, ids[index], prompts[index], answers[index], rivals[index])
        second = _ask(settings, ids[index], prompts[index], rivals[index], answers[index])
        return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((first, second), 0.5)

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(one, range(len(ids))))


def _ask(
    settings: JudgeSettings, row: str, prompt: list[dict[str, str]], left: str, right: str
) -> str:
    conversation = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    text = f"[Conversation]\n{conversation}\n\n[Answer A]\n{left}\n\n[Answer B]\n{right}"
    body = {
        "model": settings.model,
        "temperature": 0,
        "max_tokens": 8,
        "messages": [
            {"role": "system", "content": INSTRUCTION.format(criteria=settings.criteria)},
            {"role": "user", "content": text},
        ],
    }
    said = str(_post(settings, row, body)).strip().strip(".*\"'").upper()
    if said not in ("A", "B", "TIE"):
        raise EvaluationError(
            where=f"evaluation.judge, row {row}",
            found=f"the judge said {said[:80]!r}",
            expected="A, B or TIE",
            fix="use a stronger judge",
        )
    return said


def _post(settings: JudgeSettings, row: str, body: dict[str, Any]) -> Any:
    headers = {}
    if settings.api_key_env:
        key = os.environ.get(settings.api_key_env)
        if not key:
            raise EvaluationError(
                where="evaluation.judge.api_key_env",
                found=f"{settings.api_key_env} is not set",
                expected="the judge's key",
                fix="export it",
            )
        headers["Authorization"] = f"Bearer {key}"
    # httpx and not the hub's client: that one refuses any address while HF_HUB_OFFLINE is set.
    try:
        response = httpx.post(
            f"{settings.base_url.rstrip('/')}/chat/completions",
            json=body,
            headers=headers,
            timeout=settings.timeout,
        )
        return response.raise_for_status().json()["choices"][0]["message"]["content"]
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
    ) as error:
        raise EvaluationError(
            where=f"evaluation.judge, row {row}",
            found=f"{settings.base_url} failed ({type(error).__name__}: {error})",
            expected="an OpenAI-compatible /chat/completions",
            fix="check base_url, model and key; a failed judgement is never a score",
        ) from None
