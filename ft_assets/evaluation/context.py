"""Room in the model's context for each prompt and its answer.

A model has learnt no positions beyond its context, so an answer there says nothing about it. Such a
prompt is refused and never truncated: the score of a truncated few-shot prompt would flatter the
fine-tune.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ft_assets.chat.rendering import ProofFailed
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.few_shot import few_shot_prompt
from ft_assets.rows.types import DataRow

Lengths = Mapping[str, int]  # the tokens of the prompt by row id


class Room:
    """The room for prompts: the context (None: unlimited) without `max_new_tokens`."""

    def __init__(self, context: int | None, max_new_tokens: int) -> None:
        self.context = context
        self.max_new_tokens = max_new_tokens

    def has(self, lengths: Lengths) -> bool:
        """Return True if each prompt leaves room for its answer."""
        longest = max(lengths.values(), default=0)
        return self.context is None or longest + self.max_new_tokens <= self.context

    def rows_error(self, lengths: Lengths, what: str = "held-out") -> EvaluationError | None:
        """Return the error about rows whose prompts are too long, or None."""
        if self.has(lengths):
            return None
        first, found = self._found(lengths)
        left = (self.context or 0) - lengths[first]
        lower = f"lower evaluation.max_new_tokens to {left}, " if left > 0 else ""
        return EvaluationError(
            where=f"{what} row {first}",
            found=f"the prompt {found}",
            expected=f"prompt and answer within the model's context, {self.context} tokens",
            fix=f"{lower}leave out or shorten the row, or take a base with a larger context",
        )

    def few_shot_error(
        self,
        renderer: Any,
        rows: Sequence[DataRow],
        examples: Sequence[DataRow],
        system: str | None,
    ) -> EvaluationError | None:
        """Return the error about a few-shot prompt that is too long, or None.

        It has the number of examples that fit on every row. A row that cannot be rendered with the
        examples is not judged here.
        """
        lengths = few_shot_lengths(renderer, rows, examples, system)
        if self.has(lengths):
            return None
        fits = (
            count
            for count in range(len(examples) - 1, 0, -1)
            if self.has(few_shot_lengths(renderer, rows, examples[:count], system))
        )
        most = next(fits, 0)
        first, found = self._found(lengths)
        return EvaluationError(
            where=f"data.few_shot, held-out row {first}",
            found=f"the prompt with {len(examples)} examples {found}",
            expected=f"prompt and answer within the model's context, {self.context} tokens",
            fix=f"keep the first {most} of the {len(examples)} examples, which fit"
            if most
            else "not one example fits: shorten the examples or few_shot_system, or leave out "
            "data.few_shot: the report then does not compare with prompting",
        )

    def _found(self, lengths: Lengths) -> tuple[str, str]:
        """Return the id of the row with the longest prompt, and the prompt's size as text."""
        first = max(lengths, key=lambda row: lengths[row])
        beyond = sum(one + self.max_new_tokens > (self.context or 0) for one in lengths.values())
        rows = f"; {beyond} of {len(lengths)} rows are too long" if len(lengths) > 1 else ""
        total = lengths[first] + self.max_new_tokens
        return first, (
            f"has {lengths[first]} tokens, {total} with evaluation.max_new_tokens "
            f"{self.max_new_tokens}{rows}"
        )


def few_shot_lengths(
    renderer: Any,
    rows: Sequence[DataRow],
    examples: Sequence[DataRow],
    system: str | None,
) -> Lengths:
    """Return the tokens of each row's few-shot prompt."""
    asked: list[DataRow] = [
        {**row, "messages": few_shot_prompt(row["messages"][:-1], system, examples)} for row in rows
    ]
    prompts = renderer.prompts(asked)
    return {
        row["id"]: len(prompt)
        for row, prompt in zip(rows, prompts, strict=True)
        if not isinstance(prompt, ProofFailed)
    }
