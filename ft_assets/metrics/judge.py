"""An LLM judge behind any OpenAI-compatible endpoint: it compares two answers in both orders.

A judge prefers the first answer more often than it should (Zheng et al. 2023, section 3.3), so a
win counts only if it holds in both orders: 1 for two wins, 0 for two losses, else ½. The base's own
score is ½ by definition, so a candidate with a mean above ½ wins more often than it loses.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import Field, JsonValue

from ft_assets.errors import EvaluationError
from ft_assets.metrics.endpoint import Endpoint, ask
from ft_assets.metrics.registry import Metric
from ft_assets.rows.types import Message

INSTRUCTION = (
    "You compare two answers to the same conversation. {criteria}\n"
    "Judge the content alone, not the order or the length. "
    "Reply with exactly one word: A, B or TIE."
)
PARALLEL = 4
OPTIONS: dict[str, JsonValue] = {"temperature": 0, "max_tokens": 8}
Orders = Counter[tuple[str, str]]  # the replies to a pair: in its first order, and in the other


class JudgeSettings(Endpoint):
    """A judge: any OpenAI-compatible chat endpoint.

    It compares a candidate's answer with the base's, in both orders.
    """

    criteria: str = Field(
        default="Which answer serves the user better?", description="The question to the judge."
    )


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
    asked = ask(settings, f"evaluation.judge, row {row}", messages, OPTIONS)
    reply = str(asked.text).strip().strip(".*\"'").upper()
    if reply not in ("A", "B", "TIE"):
        raise EvaluationError(
            where=f"evaluation.judge, row {row}",
            found=f"the judge replied {reply[:80]!r}",
            expected="one word: A, B or TIE",
            fix="use a stronger judge",
        )
    return reply
