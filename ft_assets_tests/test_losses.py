"""Teacher-forced scores: batches with a shared prefix equal rows scored alone, and both equal transformers' own loss."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ft_assets.evaluation.losses import answer_losses, sequence_log_probabilities
from ft_assets.models.loading import load_base


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    chance = torch.Generator().manual_seed(0)
    shared = torch.randint(4, 250, (30,), generator=chance).tolist()
    rows = []
    for prompt, answer in ((5, 3), (9, 1), (2, 7), (14, 4), (3, 2)):
        ids = shared + torch.randint(4, 250, (prompt + answer,), generator=chance).tolist()
        rows.append({"input_ids": ids, "supervised": [False] * (len(ids) - answer) + [True] * answer})
    return rows


def test_shared_prefix_and_batches_change_nothing(tiny_model: Path, rows: list[dict[str, Any]]) -> None:
    model = load_base(tiny_model).float()
    together, right = answer_losses(model, rows, 2, 3)
    for row, loss, share in zip(rows, together, right, strict=True):
        alone = answer_losses(model, [row], 1, 3)
        assert loss == pytest.approx(alone[0][0], abs=1e-5)
        assert share == alone[1][0]
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor([[token if flag else -100 for token, flag in zip(row["input_ids"], row["supervised"], strict=True)]])
        assert loss == pytest.approx(float(model(input_ids=ids, labels=labels).loss), abs=1e-5)
    counts = [sum(row["supervised"]) for row in rows]
    sums = sequence_log_probabilities(model, rows, 3, 3)
    assert sums == pytest.approx([-loss * count for loss, count in zip(together, counts, strict=True)], abs=1e-4)


def test_answer_inside_a_conversation_is_scored_where_it_stands(tiny_model: Path, rows: list[dict[str, Any]]) -> None:
    model = load_base(tiny_model).float()
    row = rows[3]
    middle = {**row, "supervised": [15 <= position < 18 or position >= 44 for position in range(len(row["input_ids"]))]}
    together = answer_losses(model, [rows[0], middle], 2, 3)[0][1]
    assert together == pytest.approx(answer_losses(model, [middle], 1, 3)[0][0], abs=1e-5)
