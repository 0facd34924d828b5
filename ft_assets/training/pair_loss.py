"""The DPO loss of pairs that are watched and not trained on: TRL's own loss, with its accuracy and margin."""

from typing import Any

import torch

from ft_assets.compat.accelerate import without_gathering
from ft_assets.compat.transformers import prepare_inputs
from ft_assets.compat.trl import separate_metrics, step_metrics
from ft_assets.models.sharding import is_sharded
from ft_assets.training.dropout import without_dropout
from ft_assets.training.reference import batches

MEASURED = {"validation_accuracy": "rewards/accuracies", "validation_margin": "rewards/margins"}


class PairLoss:
    """Measures the validation loss of pairs that hold the reference's log-probabilities, `batch` pairs at once and half as many
    each time that memory runs out. `trainer`: the one that trains; each try of a training has its own.

    A loss that compares pairs with each other (bco_pair, aot) is that of the batches, which are the same in each measurement.
    """

    def __init__(self, pairs: list[dict[str, Any]], batch: int) -> None:
        self.pairs, self.batch = pairs, batch
        self.trainer: Any = None

    def __call__(self, model: Any) -> dict[str, float]:
        """Return {"validation_loss", "validation_accuracy" (0 to 1), "validation_margin"}: means over the pairs. Raises
        torch.OutOfMemoryError where one pair does not fit."""
        while True:
            try:
                return self._measured()
            except torch.OutOfMemoryError:
                if self.batch == 1 or is_sharded(
                    model
                ):  # other ranks wait in the middle of this pass
                    raise
            self.batch //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _measured(self) -> dict[str, float]:
        trainer, means = self.trainer, dict.fromkeys(("validation_loss", *MEASURED), 0.0)
        # In training mode, as the reference is scored: an evaluating pass would repack a CPU's NF4 weights for good.
        with (
            separate_metrics(trainer),
            without_gathering(trainer.accelerator),
            without_dropout(trainer.model),
            torch.no_grad(),
            trainer.accelerator.autocast(),
        ):
            for rows in batches(self.pairs, self.batch):
                step_metrics(trainer).clear()
                inputs = prepare_inputs(
                    trainer, trainer.data_collator([self.pairs[row] for row in rows])
                )
                found = {"validation_loss": float(trainer.compute_loss(trainer.model, inputs))}
                found |= {
                    name: step_metrics(trainer)[theirs][0] for name, theirs in MEASURED.items()
                }
                for name, value in found.items():
                    means[name] += value * len(rows) / len(self.pairs)
        return means
