"""Teacher-forced scores: what a model thinks of the reference answer, without generating anything."""

from collections.abc import Iterator
from typing import Any

import torch

from ft_assets.evaluation.generation import prefill, repeated, shared_prefix

Row = dict[str, Any]  # {"input_ids": tokens, "supervised": which of them are the answer and its end of turn}


@torch.no_grad()  # not inference_mode: it is asked in the middle of a training, and FSDP trains on with what it has gathered here
def answer_losses(model: Any, rows: list[Row], batch_size: int, pad: int) -> tuple[list[float], list[float]]:
    """Return, for each tokenized row, (mean cross-entropy of its supervised tokens in nats a token, share of them that
    were the most likely token)."""
    losses: dict[int, float] = {}
    right: dict[int, float] = {}
    for batch, ids, logits, keep in _batches(model, rows, batch_size, pad):
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        counts = keep.sum(1)
        losses.update(zip(batch, ((loss * keep).sum(1) / counts).tolist(), strict=True))
        right.update(zip(batch, (((logits.argmax(-1) == ids) & keep).sum(1) / counts).tolist(), strict=True))
    order = range(len(rows))
    return [losses[index] for index in order], [right[index] for index in order]


@torch.inference_mode()
def sequence_log_probabilities(model: Any, rows: list[Row], batch_size: int, pad: int) -> list[float]:
    """Return, for each tokenized row, the summed log-probability of its supervised tokens in nats."""
    sums: dict[int, float] = {}
    for batch, ids, logits, keep in _batches(model, rows, batch_size, pad):
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        sums.update(zip(batch, (-(loss * keep).sum(1)).tolist(), strict=True))
    return [sums[index] for index in range(len(rows))]


def _batches(model: Any, rows: list[Row], batch_size: int, pad: int) -> Iterator[tuple[list[int], Any, Any, Any]]:
    """Yield (row numbers, next tokens, their fp32 logits, whether each is supervised), rows of like length together.

    What all prompts begin with is computed once. Logits are made from the first supervised token on: with a vocabulary
    of 128k the prompts' would fill the memory.
    """
    model.eval()
    prefix = shared_prefix([row["input_ids"][: row["supervised"].index(True)] for row in rows]) if rows else []
    cache, skip = prefill(model, prefix) if prefix else None, len(prefix)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        chosen = [(rows[index]["input_ids"][skip:], rows[index]["supervised"][skip:]) for index in batch]
        width = max(len(ids) for ids, _ in chosen)
        first = min(supervised.index(True) for _, supervised in chosen)
        ids = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens, _ in chosen], device=model.device)
        mask = torch.tensor([[1] * (skip + len(tokens)) + [0] * (width - len(tokens)) for tokens, _ in chosen], device=model.device)
        keep = torch.tensor([flags + [False] * (width - len(flags)) for _, flags in chosen], device=model.device)
        kept = width - first + 1  # the logits that predict tokens first … width-1, and one more that predicts nothing
        past = {"past_key_values": repeated(cache, len(batch))} if cache is not None else {}
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, **past).logits[:, :-1].float()
        yield batch, ids[:, first:], logits, keep[:, first:]
