"""The rows whose prompts a model is asked to answer during training, with their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_assets.chat.rendering import Renderer
from ft_assets.data.tables import Table, read_table
from ft_assets.evaluation.asker import prompts, tokenized
from ft_assets.evaluation.context import Room
from ft_assets.evaluation.references import ReferencedRow, with_references
from ft_assets.models.loading import context_length
from ft_assets.rows.types import MemberRow, TokenizedRow


@dataclass(frozen=True)
class AskedPrompt:
    """A row with the token ids of its prompt, and of its reference with the stop token."""

    row: ReferencedRow
    prompt: list[int]
    reference_ids: list[int]


def own_rows(inputs: Mapping[str, Path], side: str, most: int | None) -> list[TokenizedRow]:
    """Return the first `most` rows of a side of heldout_split to sample answers to, by id.

    Not general conversations, which the metric is not about, and no part of a longer one.
    `inputs`: the folders of heldout_split, raw_dataset, and own_rehearsal if there is one.
    """
    rehearsal = inputs.get("own_rehearsal", inputs["raw_dataset"]) / "rehearsal.parquet"
    general = {row["id"] for row in Table[MemberRow](rehearsal, ["id"])}
    table = read_table(inputs["heldout_split"] / f"{side}.parquet", row=TokenizedRow)
    rows = [row for row in table if row["judged"] and row["id"] not in general]
    return sorted(rows, key=lambda row: row["id"])[:most]


def own_prompts(
    snapshot: Path,
    tokenizer: Any,
    stops: frozenset[int],
    rows: Sequence[TokenizedRow],
    max_new_tokens: int,
) -> list[AskedPrompt]:
    """Return the prompts of rows, in their order.

    Raises EvaluationError for a prompt without room for its answer.
    """
    renderer = Renderer(tokenizer, stops)
    asked = prompts(renderer, rows)
    room = Room(context_length(snapshot), max_new_tokens)
    lengths = {row["id"]: len(prompt) for row, prompt in zip(rows, asked, strict=True)}
    if error := room.rows_error(lengths, "train or validation"):
        raise error
    referenced = with_references(tokenizer, tokenized(renderer, rows))
    return [
        AskedPrompt(row, prompt, row["input_ids"][row["supervised"].index(True) :])
        for row, prompt in zip(referenced, asked, strict=True)
    ]
