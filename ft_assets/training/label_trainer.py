"""TRL's KTOTrainer for tokenized labelled answers (Ethayarajh et al. 2024).

KTO's loss compares the reward of an answer with the KL divergence of the policy from the reference,
which TRL estimates from answers to other prompts. A labelled answer and its answer to another
prompt travel as a pair (pairs.py), so that the reference of both is scored, stored and proven as
DPO's is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

from ft_assets.compat.trl import drop_reference_copy, expect_reference_scores, fused_head
from ft_assets.models.padding import padding_token
from ft_assets.training.pair_trainer import SharingMetrics
from ft_assets.training.pairs import TokenPair, with_reference
from ft_assets.training.prepare import full_precision_adapter
from ft_assets.training.trl_options import ReportsTrlErrors
from ft_assets.training.validation import LogsValidation

ANSWERS = 2  # of a pair: a batch of n pairs has as many tokens as one of 2n labelled answers
MOST_WEIGHT = 4 / 3  # ratio of the weighted labels up to which they count as balanced (eq. 8)
NAMES = {
    "chosen_ids": "completion_ids",
    "rejected_ids": "KL_completion_ids",
    "ref_chosen_logps": "ref_logps",
    "ref_rejected_logps": "ref_KL_logps",
}
SCORED = ("", "KL_")


def labelled(pairs: Sequence[TokenPair], seed: int) -> list[TokenPair]:
    """Return the answers of pairs with their labels, in the order of training.

    A side of a pair that has no tokens is no answer. The order is random, as a trainer of KTO reads
    its rows in their order. Each answer gets the answer of the row before that has another prompt.
    """
    answers = [
        (pair["prompt_ids"], ids, label)
        for pair in pairs
        for ids, label in ((pair["chosen_ids"], True), (pair["rejected_ids"], False))
        if ids
    ]
    order = np.random.default_rng(seed).permutation(len(answers))
    answers = [answers[place] for place in order]
    return [
        {
            "prompt_ids": prompt,
            "chosen_ids": ids,
            "rejected_ids": _of_another_prompt(answers, row),
            "label": label,
        }
        for row, (prompt, ids, label) in enumerate(answers)
    ]


def is_labelled(rows: Sequence[TokenPair]) -> bool:
    """Return True for labelled answers, False for pairs."""
    return bool(rows) and "label" in rows[0]


def _of_another_prompt(answers: Sequence[tuple[list[int], list[int], bool]], row: int) -> list[int]:
    others = (answers[row - back] for back in range(1, len(answers)))
    before = answers[row - 1][1]
    return next((ids for prompt, ids, _ in others if prompt != answers[row][0]), before)


def weights(rows: Sequence[TokenPair]) -> dict[str, float]:
    """Return TRL's weights of the two labels: the rarer one counts as much as the other.

    Labels whose counts are within MOST_WEIGHT of each other have a weight of 1.
    """
    good = sum(bool(row.get("label")) for row in rows)
    bad = len(rows) - good
    if not good or not bad or max(good, bad) / min(good, bad) <= MOST_WEIGHT:
        return {}
    rarer = "desirable_weight" if good < bad else "undesirable_weight"
    return {rarer: round(max(good, bad) / min(good, bad), 4)}


@dataclass
class LabelCollator(DataCollatorForUnpairedPreference):
    """TRL's batch of B labelled answers and B answers to other prompts, from pairs of the two."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(
            [
                {"label": True, **{NAMES.get(name, name): value for name, value in one.items()}}
                for one in examples
            ]
        )


class LabelTrainer(LogsValidation, ReportsTrlErrors, KTOTrainer):
    """KTOTrainer for the rows of `labelled`, with the reference's scores. No prompt is shared."""

    key = "dpo"
    shares = False
    ld_alpha = None

    def __init__(
        self, *, model: Any, args: KTOConfig, pairs: Sequence[TokenPair], tokenizer: Any
    ) -> None:
        self.pairs = pairs
        self.sharing = SharingMetrics()
        multiple: Any = args.pad_to_multiple_of
        exact = {
            name: weight.data for name, weight in model.named_parameters() if weight.requires_grad
        }
        super().__init__(
            model=model,
            args=args,
            data_collator=LabelCollator(
                padding_token(model, tokenizer), pad_to_multiple_of=multiple
            ),
            train_dataset=Dataset.from_list([{**with_reference(pair)} for pair in pairs]),
            processing_class=tokenizer,
        )
        drop_reference_copy(self.model)  # the reference is scored before the first step
        full_precision_adapter(model, exact)
        expect_reference_scores(self)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # already tokenized and proven

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # reference.py scores it

    def log_probabilities(self, inputs: Any) -> torch.Tensor:
        """Return the summed log-probability of each answer in nats (2B,), the labelled first."""
        return torch.cat([self._summed(inputs, kind) for kind in SCORED])

    def _summed(self, inputs: Any, kind: str) -> torch.Tensor:
        ids, mask = inputs[f"{kind}input_ids"], inputs[f"{kind}completion_mask"]
        fed = {"input_ids": ids, "attention_mask": inputs[f"{kind}attention_mask"]}
        labels = ids.masked_fill(mask == 0, -100)
        return fused_head(self.model, **fed, labels=labels, use_cache=False).log_probs.sum(1)

    @property
    def first_loss(self) -> float | None:
        """The loss while policy and reference agree, or None if it is not known."""
        return None if self.aux_loss_enabled else 0.5

    def unweighted_loss(self, inputs: Any) -> float:
        """Return TRL's loss of a batch without the weights of the labels."""
        weighted = self.desirable_weight, self.undesirable_weight
        self.desirable_weight = self.undesirable_weight = 1.0
        try:
            model: Any = self.model
            return float(self.compute_loss(model, inputs))
        finally:
            self.desirable_weight, self.undesirable_weight = weighted
