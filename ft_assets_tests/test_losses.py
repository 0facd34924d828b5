"""Test the teacher-forced scores.

Batches with a shared prefix equal rows scored alone. Both equal the loss of transformers itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ft_assets.inference import losses as module
from ft_assets.inference.losses import answer_losses, sequence_log_probabilities, token_scores
from ft_assets.models.loading import load_base


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    chance = torch.Generator().manual_seed(0)
    shared = torch.randint(4, 250, (30,), generator=chance).tolist()
    rows = []
    for prompt, answer in ((5, 3), (9, 1), (2, 7), (14, 4), (3, 2)):
        ids = shared + torch.randint(4, 250, (prompt + answer,), generator=chance).tolist()
        rows.append(
            {"input_ids": ids, "supervised": [False] * (len(ids) - answer) + [True] * answer}
        )
    return rows


def test_shared_prefix_and_batches_change_nothing(
    tiny_model: Path, rows: list[dict[str, Any]]
) -> None:
    model = load_base(tiny_model).float()
    together, right = answer_losses(model, rows, 2, 3)
    for row, loss, share in zip(rows, together, right, strict=True):
        alone = answer_losses(model, [row], 1, 3)
        assert loss == pytest.approx(alone[0][0], abs=1e-5)
        assert share == alone[1][0]
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(
            [
                [
                    token if flag else -100
                    for token, flag in zip(row["input_ids"], row["supervised"], strict=True)
                ]
            ]
        )
        assert loss == pytest.approx(float(model(input_ids=ids, labels=labels).loss), abs=1e-5)
    counts = [sum(row["supervised"]) for row in rows]
    sums = sequence_log_probabilities(model, rows, 3, 3)
    assert sums == pytest.approx(
        [-loss * count for loss, count in zip(together, counts, strict=True)], abs=1e-4
    )
    for row, found, total in zip(rows, token_scores(model, rows, 2, 3, (1, 2)), sums, strict=True):
        assert float(found.log_probabilities[:, 0].sum()) == pytest.approx(total, abs=1e-4)
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        own = logits[torch.tensor(row["supervised"][1:])]
        assert found.best == own.argmax(1).tolist()
        tokens = torch.tensor([row["input_ids"][-len(own) :]]).T
        cooler = (own / 2).log_softmax(1).gather(1, tokens)[:, 0]
        torch.testing.assert_close(found.log_probabilities[:, 1], cooler, atol=1e-5, rtol=0)


def test_answer_inside_a_conversation_is_scored_where_it_stands(
    tiny_model: Path, rows: list[dict[str, Any]]
) -> None:
    model = load_base(tiny_model).float()
    row = rows[3]
    middle = {
        **row,
        "supervised": [
            15 <= position < 18 or position >= 44 for position in range(len(row["input_ids"]))
        ],
    }
    together = answer_losses(model, [rows[0], middle], 2, 3)[0][1]
    assert together == pytest.approx(answer_losses(model, [middle], 1, 3)[0][0], abs=1e-5)


def plain(model: Any, row: dict[str, Any]) -> tuple[float, float]:
    """Score one row from all its logits; return nats per token and the share of top-1 tokens."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
    ids, keep = torch.tensor(row["input_ids"][1:]), torch.tensor(row["supervised"][1:])
    losses = torch.nn.functional.cross_entropy(logits[keep], ids[keep], reduction="none")
    return float(losses.mean()), float((logits[keep].argmax(-1) == ids[keep]).float().mean())


def watched(model: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that collects shapes: of the head's outputs, or of the batches of tokens."""
    shapes = list[tuple[int, ...]]()
    if method == "head":
        model.get_output_embeddings().register_forward_hook(
            lambda _, __, logits: shapes.append(tuple(logits.shape))
        )
    else:
        own: Callable[..., Any] = model.get_input_embeddings().forward
        monkeypatch.setattr(
            model.get_input_embeddings(),
            "forward",
            lambda ids: (shapes.append(tuple(ids.shape)), own(ids))[1],
        )
    return shapes


def test_few_logits_are_made_at_once_and_none_where_nothing_is_supervised(
    tiny_model: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(tiny_model).float()
    expected = [plain(model, row) for row in rows]
    monkeypatch.setattr(module, "LOGITS", 3 * model.config.vocab_size)
    shapes = watched(model, "head", monkeypatch)
    losses, right = answer_losses(model, rows, 5, 3)
    assert losses == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    assert right == pytest.approx([share for _, share in expected])
    chunks = shapes[2:]  # the first two are one position of the prefix, and one of each row
    assert shapes[:2] == [(1, 1, model.config.vocab_size), (5, 1, model.config.vocab_size)]
    assert all(rows_ * positions <= 3 for rows_, positions, _ in chunks)
    assert sum(positions for _, positions, _ in chunks) == sum(
        sum(row["supervised"]) for row in rows
    )


def test_logits_are_those_the_model_itself_makes_of_its_head(
    tiny_model: Path, rows: list[dict[str, Any]]
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.01,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    uncapped = model.get_output_embeddings()(
        model.model(input_ids=torch.tensor([rows[0]["input_ids"]])).last_hidden_state
    )
    assert float(uncapped.detach().abs().max()) > 0.01  # else the cap would change nothing
    assert answer_losses(model, rows, 2, 3)[0] == pytest.approx(
        [plain(model, row)[0] for row in rows], abs=1e-5
    )


def test_rows_that_do_not_fit_at_once_are_halved(
    tiny_model: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(tiny_model).float()
    expected = answer_losses(model, rows, 5, 3)
    own, sizes = model.model.layers[1].forward, []

    def full(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(hidden))
        if len(hidden) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return own(hidden, *args, **kwargs)

    monkeypatch.setattr(model.model.layers[1], "forward", full)
    most = 1
    assert answer_losses(model, rows, 5, 3)[0] == pytest.approx(expected[0], abs=1e-5)
    assert sizes[1:] == [5, 2, 1, 1, 3, 1, 2, 1, 1]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        answer_losses(model, rows, 5, 3)


def test_a_batch_has_at_most_so_many_tokens(
    tiny_model: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(tiny_model).float()
    expected = answer_losses(model, rows, 5, 3)[0]
    shapes = watched(model, "tokens", monkeypatch)
    assert answer_losses(model, rows, 5, 3, most_tokens=80)[0] == pytest.approx(expected, abs=1e-5)
    # The first shape is the prefix. The rows have 35 and 38, 39 and 40, and 48 tokens.
    assert [count for count, _ in shapes[1:]] == [2, 2, 1]
