"""The SFT loss on a CPU: the head is applied to the supervised positions only.

TRL's fused head does that on CUDA. On a CPU it scores every position, which costs a fifth of the
step if half of the tokens are masked. The first batch is scored both ways. If the results differ
(soft-capped or scaled logits, for example), TRL's own loss is used for the whole training.
"""

from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from ft_assets.models.decoder import decoder_of
from ft_assets.training.dropout import without_dropout
from ft_assets.training.precision import autocast_if_mixed

TOLERANCE = 0.01  # relative; bf16 autocast rounds the two paths differently


class CpuSFTTrainer(SFTTrainer):
    """SFTTrainer whose nll loss skips the head where nothing is supervised."""

    agrees: bool | None = None
    precision: Any = None  # set with `agrees`, on the first batch: only then are dtypes final

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # A mixture of experts has a loss of its own.
        plain = (
            getattr(self.args, "loss_type", None) == "nll"
            and self.label_smoother is None
            and not self.aux_loss_enabled
        )
        if return_outputs or not plain or self.agrees is False:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.agrees is None:
            # Without dropout and without a change of the random state: a resumed run compares
            # again, on another batch.
            with torch.no_grad(), torch.random.fork_rng(devices=[]), without_dropout(self.model):
                self.precision = autocast_if_mixed(self.model)
                with self.precision:
                    ours = supervised_loss(self.model, inputs, num_items_in_batch)
                theirs = super().compute_loss(model, dict(inputs), False, num_items_in_batch)
            self.agrees = bool((ours - theirs).abs() <= TOLERANCE * theirs.abs())
            if not self.agrees:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.precision:
            return supervised_loss(self.model, inputs, num_items_in_batch)


def supervised_loss(model: Any, inputs: Any, num_items: Any) -> torch.Tensor:
    """Return the loss of a micro-batch (a scalar).

    It is the summed cross-entropy of the supervised tokens over their number in the whole step.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forwarded = {key: value for key, value in inputs.items() if key not in ("labels", "use_cache")}
    hidden = decoder_of(base)(**forwarded, use_cache=False).last_hidden_state[:, :-1]  # (B,T-1,D)
    labels = inputs["labels"][:, 1:]  # (B, T-1)
    keep = labels != -100
    head = base.get_output_embeddings()
    # Some families, such as Mamba2, return their residual stream in fp32.
    logits = head(hidden[keep].to(head.weight.dtype)).float()  # (supervised, vocabulary)
    total = torch.nn.functional.cross_entropy(logits, labels[keep], reduction="sum")
    return total / (keep.sum() if num_items is None else torch.as_tensor(num_items)).clamp(min=1)
