"""Ask the active candidate of a model: answers, losses of the references, option probabilities.

Not here: the score of an answer (scorer.py). A value that is kept from an earlier version is not
asked again (kept_answers.py).
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.context import Room
from ft_assets.evaluation.form import held_rows
from ft_assets.evaluation.kept_answers import AskedOption, AskedRow, GivenAnswer, Kept, digest
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.scorer import Task
from ft_assets.inference.generation import generate
from ft_assets.inference.losses import answer_losses, sequence_log_probabilities
from ft_assets.rows.types import Message, TokenizedRow

LOSS_BATCH = 32
Row = TypeVar("Row", bound=TokenizedRow)
Tokens = TypeVar("Tokens")
Value = TypeVar("Value")


class Asker:
    """Asks the candidate that is active in the model.

    weights: the identity of the candidate's weights and of the libraries, for the digests. kept:
    the values that need not be asked. asked: which rows, for errors. generated: the tokens that
    were generated. slower: why they were generated without a shortcut.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stops: frozenset[int],
        task: Task,
        weights: str = "",
        kept: Kept | None = None,
        asked: str = "held-out",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stops = stops
        self.task = task
        self.settings = task.settings
        self.weights = weights
        self.kept = kept or Kept()
        self.asked = asked
        self.generated = 0
        self.slower: dict[str, None] = {}
        self.renderer = Renderer(tokenizer, stops)
        config = model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        self.room = Room(context, task.settings.max_new_tokens)

    def heldout(self, rows: Sequence[ReferencedRow], held: bool = False) -> list[AskedRow]:
        """Answer held-out rows, and score their references and options by probability.

        held: score the labels too if `choice` is off, of the first rows by id (form.py).
        """
        return self._rows(rows, self.answers(rows), self._options(rows, held))

    def _options(self, rows: Sequence[ReferencedRow], held: bool) -> list[list[AskedOption]]:
        if self.settings.choice:
            return self.options(rows)
        found: list[list[AskedOption]] = [[] for _ in rows]
        if held and self.settings.labels:
            by_id = sorted(range(len(rows)), key=lambda index: rows[index]["id"])
            chosen = by_id[: held_rows(len(rows), len(self.settings.labels))]
            for index, options in zip(
                chosen, self.options([rows[index] for index in chosen]), strict=True
            ):
                found[index] = options
        return found

    def retention(self, rows: Sequence[ReferencedRow]) -> list[AskedRow]:
        """Score general prompts: the loss of all, and the first `retention_answers` answered."""
        return self._rows(rows, self.answers(rows[: self.settings.retention_answers]), [])

    def train(self, rows: Sequence[ReferencedRow], held: bool = False) -> list[AskedRow]:
        """Score train rows: their losses, and of a task of few answers as held-out rows."""
        return self.heldout(rows, held) if self.task.few_answers else self._rows(rows, [], [])

    def _rows(
        self,
        rows: Sequence[ReferencedRow],
        answers: list[GivenAnswer],
        options: list[list[AskedOption]],
    ) -> list[AskedRow]:
        keys = [self._loss_key(row) for row in rows]
        return [
            AskedRow(
                row["id"],
                row["reference"],
                *scored,
                answers[index] if index < len(answers) else None,
                options[index] if index < len(options) else [],
                keys[index],
            )
            for index, (row, scored) in enumerate(zip(rows, self._losses(rows, keys), strict=True))
        ]

    def answers(self, rows: Sequence[TokenizedRow]) -> list[GivenAnswer]:
        """Return the greedy answers."""
        if not rows:
            return []
        asked, limit = prompts(self.renderer, rows), self.settings.max_new_tokens
        lengths = {row["id"]: len(ids) for row, ids in zip(rows, asked, strict=True)}
        if (error := self.room.rows_error(lengths, self.asked)) is not None:
            raise error
        keys = [answer_key(self.weights, limit, self.stops, ids) for ids in asked]

        def generated(missing: list[int]) -> list[GivenAnswer]:
            answers = generate(
                self.model,
                self.tokenizer,
                [asked[index] for index in missing],
                self.stops,
                limit,
                self.settings.batch_size,
                [rows[index]["id"] for index in missing],
                told=lambda reason: self.slower.setdefault(reason),
            )
            self.generated += sum(answer.tokens for answer in answers)
            return [
                GivenAnswer(answer.text, answer.stopped, answer.tokens, keys[index])
                for index, answer in zip(missing, answers, strict=True)
            ]

        return _known_or(keys, self.kept.answers, generated)

    def losses(self, rows: Sequence[TokenizedRow]) -> tuple[list[float], list[float]]:
        """Return the losses (nats per token) and token accuracies of the reference answers."""
        scored = self._losses(rows, [self._loss_key(row) for row in rows])
        return [loss for loss, _ in scored], [accuracy for _, accuracy in scored]

    def _loss_key(self, row: TokenizedRow) -> str:
        return digest("loss", self.weights, row["input_ids"], list(row["supervised"]))

    def _losses(self, rows: Sequence[TokenizedRow], keys: list[str]) -> list[tuple[float, float]]:
        def computed(missing: list[int]) -> list[tuple[float, float]]:
            losses, accuracies = answer_losses(
                self.model,
                [rows[index] for index in missing],
                self.settings.batch_size or LOSS_BATCH,
                self.tokenizer.pad_token_id,
            )
            return list(zip(losses, accuracies, strict=True))

        return _known_or(keys, self.kept.losses, computed)

    def options(self, rows: Sequence[ReferencedRow]) -> list[list[AskedOption]]:
        """Return each label, or each option of the row, with its log-probability as the answer."""
        per_row = self.settings.choice == "options"
        offered = [row.get("options", []) if per_row else self.settings.labels for row in rows]
        answered = [
            _with_answer(row, {"role": "assistant", "content": option})
            for row, options in zip(rows, offered, strict=True)
            for option in options
        ]
        rendered = tokenized(self.renderer, answered)
        keys = [
            digest("option", self.weights, row["input_ids"], list(row["supervised"]))
            for row in rendered
        ]
        sums = _known_or(
            keys,
            self.kept.options,
            lambda missing: sequence_log_probabilities(
                self.model,
                [rendered[index] for index in missing],
                self.settings.batch_size or LOSS_BATCH,
                self.tokenizer.pad_token_id,
            ),
        )
        asked = [
            AskedOption(row["messages"][-1]["content"], value, sum(row["supervised"]), key)
            for row, value, key in zip(rendered, sums, keys, strict=True)
        ]
        remaining = iter(asked)
        return [list(islice(remaining, len(options))) for options in offered]

    def loss_under(self, template: str, rows: Sequence[TokenizedRow]) -> float:
        """Return the mean loss of the references under another template, in nats per token."""
        used = self.tokenizer.chat_template
        self.tokenizer.chat_template = template
        try:
            rendered = tokenized(Renderer(self.tokenizer, self.stops), rows)
            return statistics.fmean(self.losses(rendered)[0])
        finally:
            self.tokenizer.chat_template = used


def answer_key(weights: str, limit: int, stops: frozenset[int], prompt: list[int]) -> str:
    """Return the digest of all that decides an answer. limit: of new tokens. prompt: token ids."""
    return digest("answer", weights, limit, sorted(stops), prompt)


def _known_or(
    keys: list[str], known: Mapping[str, Value], ask: Callable[[list[int]], Sequence[Value]]
) -> list[Value]:
    """Return the value of each key: the known one, else what `ask` returns for its index."""
    missing = [index for index, key in enumerate(keys) if key not in known]
    asked = dict(zip(missing, ask(missing), strict=True)) if missing else {}
    return [asked[index] if index in asked else known[key] for index, key in enumerate(keys)]


def _with_answer(row: Row, answer: Message) -> Row:
    changed = row.copy()
    changed["messages"] = [*row["messages"][:-1], answer]
    return changed


def tokenized(renderer: Renderer, rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the tokens of prompt and answer. Raises EvaluationError."""
    result = []
    for row, rendered in zip(rows, renderer.answers(rows), strict=True):
        prompt, answer = _proven(row, rendered)
        changed = row.copy()
        changed["input_ids"] = prompt + answer
        changed["supervised"] = [False] * len(prompt) + [True] * len(answer)
        result.append(changed)
    return result


def prompts(renderer: Renderer, rows: Sequence[TokenizedRow]) -> list[list[int]]:
    """Return the token ids before the last message of each row. Raises EvaluationError."""
    asked: list[TokenizedRow] = [{**row, "messages": row["messages"][:-1]} for row in rows]
    rendered = renderer.prompts(asked)
    return [_proven(row, prompt) for row, prompt in zip(rows, rendered, strict=True)]


def _proven(row: TokenizedRow, rendered: Tokens | ProofFailed) -> Tokens:
    if isinstance(rendered, ProofFailed):
        raise EvaluationError(
            where=f"held-out row {row['id']}",
            found=f"cannot be rendered for this candidate: {rendered}",
            expected="a prompt that the chat template accepts",
            fix="correct data.few_shot and few_shot_system, or chat.chat_template",
        )
    return rendered


@contextmanager
def active(model: Any, adapter: str | None) -> Iterator[None]:
    """Activate one adapter, or disable all of them (None), for the duration of the block."""
    if adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        yield
