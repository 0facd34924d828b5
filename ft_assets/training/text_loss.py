"""What continued pretraining measures: the loss of documents, and what becomes of general rows."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from ft_assets.inference.losses import answer_losses
from ft_assets.rows.types import TokenSequence
from ft_assets.training.memory_plan.plan import Plan
from ft_assets.training.precision import autocast_if_mixed
from ft_assets.training.sft import MeasureOf
from ft_assets.training.validation import Measure

GENERAL_ROWS = 64  # of which the loss is measured


def text_measure(size: int, general: Sequence[TokenSequence]) -> MeasureOf:
    """Return the maker of the measurement for documents of `size` bytes of UTF-8.

    It measures nats per token, bits per byte, which do not depend on the tokenizer, and the mean
    loss of the answers to the first `general` rows.
    """
    return functools.partial(_measure, size, list(general)[:GENERAL_ROWS])


def _measure(
    size: int,
    general: Sequence[TokenSequence],
    rows: Sequence[TokenSequence],
    plan: Plan,
    pad: int,
) -> Measure | None:
    counts = [sum(row["supervised"]) for row in rows]

    def measure(model: Any) -> dict[str, float]:
        training = model.training
        with autocast_if_mixed(model):
            losses, _ = answer_losses(model, rows, plan.micro_batch, pad, plan.largest)
            of_general, _ = answer_losses(model, general, plan.micro_batch, pad, plan.largest)
        model.train(training)
        nats = sum(loss * count for loss, count in zip(losses, counts, strict=True))
        found = {
            "validation_loss": nats / sum(counts),
            "bits_per_byte": nats / math.log(2) / size,
        }
        if general:
            found["general_loss"] = sum(of_general) / len(of_general)
        return found

    return measure if rows else None
