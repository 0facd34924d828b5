"""The DPO or KTO loss of validation pairs: TRL's own loss, with its accuracy and margin."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ft_assets.compat.accelerate import without_gathering
from ft_assets.compat.transformers import prepare_inputs
from ft_assets.compat.trl import separate_metrics, step_metrics
from ft_assets.models.sharding import is_sharded
from ft_assets.training.dropout import without_dropout
from ft_assets.training.pairs import ReferencedPair
from ft_assets.training.reference import batches

MEASURED = {"validation_accuracy": "rewards/accuracies", "validation_margin": "rewards/margins"}
LABELS_MEASURED = {"validation_kl": "kl"}  # a batch of labels may have no margin


class PairLoss:
    """Measure the validation loss of pairs that hold the reference's log-probabilities.

    `batch` pairs are scored at once, and half as many each time that memory runs out. `trainer` is
    the one that trains; each try of a training sets its own.

    A loss that compares pairs with each other (bco_pair, aot) depends on the batches. These are the
    same in each measurement.
    """

    def __init__(
        self, pairs: Sequence[ReferencedPair], batch: int, measured: Mapping[str, str] = MEASURED
    ) -> None:
        self.pairs = pairs
        self.measured = measured
        self.batch = batch
        self.trainer: Any = None

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the means over the pairs.

        Keys: "validation_loss", and by default "validation_accuracy" (0 to 1) and
        "validation_margin". Raises torch.OutOfMemoryError if one pair does not fit.
        """
        while True:
            try:
                return self._measure()
            except torch.OutOfMemoryError:
                # The other ranks of a sharded base wait in the middle of this pass.
                if self.batch == 1 or is_sharded(model):
                    raise
            self.batch //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _measure(self) -> dict[str, float]:
        trainer = self.trainer
        means = dict.fromkeys(("validation_loss", *self.measured), 0.0)
        # In training mode, as the reference is scored: a pass in evaluation mode would repack a
        # CPU's NF4 weights for good. Every rank measures all pairs, so nothing is gathered.
        with (
            separate_metrics(trainer),
            without_gathering(trainer.accelerator),
            without_dropout(trainer.model),
            torch.no_grad(),
            trainer.accelerator.autocast(),
        ):
            for rows in batches(self.pairs, self.batch):
                step_metrics(trainer).clear()
                batch = trainer.data_collator([self.pairs[row] for row in rows])
                inputs = prepare_inputs(trainer, batch)
                found = {"validation_loss": float(trainer.compute_loss(trainer.model, inputs))}
                for name, theirs in self.measured.items():
                    found[name] = step_metrics(trainer)[theirs][0]
                for name, value in found.items():
                    means[name] += value * len(rows) / len(self.pairs)
        return means
