"""TRL's DPOTrainer for tokenized pairs, with shared prompts where they are proven to be right."""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ft_assets.compat.transformers import prepare_inputs
from ft_assets.compat.trl import drop_reference_copy, expect_reference_scores, fused_head
from ft_assets.models.padding import padding_token
from ft_assets.training.dropout import without_dropout
from ft_assets.training.isolation import MAX_LEAK
from ft_assets.training.length_order import LengthOrder
from ft_assets.training.pairs import (
    PairCollator,
    SharedPrompts,
    TokenPair,
    row_length,
    with_reference,
)
from ft_assets.training.prepare import full_precision_adapter
from ft_assets.training.reference import (
    EXACT_A_TOKEN,
    ROUNDING_A_TOKEN,
    TIMES_NOISE,
    half_precision,
)
from ft_assets.training.trl_options import ReportsTrlErrors
from ft_assets.training.validation import LogsValidation

CHECKED_PAIRS = 4


class SharingMetrics(TypedDict, total=False):
    """The measured differences of check_prompt_sharing, in nats a token; absent if not measured.

    sharing_leak: the movement of an answer's scores when the answer before it changes, as a share
    of the changed answer's own movement.
    """

    sharing_difference: float
    sharing_noise: float
    sharing_leak: float


class PairTrainer(LogsValidation, ReportsTrlErrors, DPOTrainer):
    """DPOTrainer for rows with prompt_ids, chosen_ids, rejected_ids and the reference's scores.

    `shares`: whether a pair's prompt is computed once. It becomes False if the model cannot be
    scored so (see check_prompt_sharing), or if the loss needs outputs of TRL's own pass: WPO's
    weights, or the expert load of a mixture.
    """

    key = "dpo"

    def __init__(
        self,
        *,
        model: Any,
        args: DPOConfig,
        pairs: Sequence[TokenPair],
        tokenizer: Any,
        shares: bool,
        **kwargs: Any,
    ) -> None:
        self.pairs = pairs
        self.sharing = SharingMetrics()
        rows = [{"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0, **pair} for pair in pairs]
        multiple: Any = args.pad_to_multiple_of
        exact = {
            name: weight.data for name, weight in model.named_parameters() if weight.requires_grad
        }
        collator = PairCollator(
            pad_token_id=padding_token(model, tokenizer), pad_to_multiple_of=multiple
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **kwargs,
        )
        drop_reference_copy(self.model)  # the reference is scored before the first step
        # Before the reference is scored, and before there is an optimizer.
        full_precision_adapter(model, exact)
        expect_reference_scores(self)
        self.shares = shares and not (self.use_weighting or self.aux_loss_enabled)

    @property
    def first_loss(self) -> float | None:
        """The loss while policy and reference agree, or None if it is not known."""
        known = self.loss_types in (["sigmoid"], ["sigmoid", "sft"])
        return math.log(2) if known and not (self.use_weighting or self.aux_loss_enabled) else None

    def unweighted_loss(self, inputs: Any) -> float:
        """Return TRL's first loss of a batch, without its weight and without an SFT term."""
        model: Any = self.model
        every = self.loss_types, self.loss_weights
        self.loss_types, self.loss_weights = self.loss_types[:1], [1.0]
        try:
            return float(self.compute_loss(model, inputs))
        finally:
            self.loss_types, self.loss_weights = every

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # already tokenized and proven

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # reference.py scores it

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthOrder:
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = [row_length(pair) for pair in self.pairs]
        return LengthOrder(lengths, step, args.data_seed or args.seed)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        theirs = {name: value for name, value in inputs.items() if not name.startswith("shared_")}
        scored = SharedPrompts(model, inputs) if self.shares else model
        return super()._compute_loss(scored, theirs, return_outputs)

    def token_scores(self, inputs: Any, shares: bool) -> torch.Tensor:
        """Return the log-probability of each answer token (2B, L-1), zero elsewhere."""
        model: Any = SharedPrompts(self.model, inputs) if shares else self.model
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)  # (2B, L)
        fed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return fused_head(model, **fed, labels=labels, use_cache=False).log_probs

    def log_probabilities(self, inputs: Any) -> torch.Tensor:
        """Return the summed log-probability of each answer in nats (2B,), chosen answers first.

        With ld_alpha the tokens are weighted as TRL does (LD-DPO).
        """
        scores = self.token_scores(inputs, self.shares)  # (2B, L-1)
        if self.ld_alpha is None:
            return scores.sum(1)
        mask = inputs["completion_mask"][:, 1:]
        lengths = mask.sum(1)  # (2B,)
        both = torch.minimum(*lengths.chunk(2)).repeat(2).unsqueeze(1)  # (2B, 1)
        place = mask.cumsum(1)
        return (scores * (place <= both)).sum(1) + self.ld_alpha * (scores * (place > both)).sum(1)

    def answer_scores(self, pairs: Sequence[TokenPair], shares: bool) -> list[torch.Tensor]:
        """Return the log-probabilities of each answer's tokens, all chosen answers first."""
        collated = self.data_collator([{**with_reference(pair)} for pair in pairs])
        batch = prepare_inputs(self, collated)
        scored = batch["completion_mask"][:, 1:] == 1
        rows = zip(self.token_scores(batch, shares), scored, strict=True)
        return [row[places] for row, places in rows]

    def check_prompt_sharing(self) -> bool:
        """Share prompts only if the scores of the first pairs agree with TRL's. Returns `shares`.

        The pairs are scored as TRL does, with the prompt shared, and shared with the two answers in
        the other order; all three must agree. A model that ignores the mask or the positions sees
        one answer in the other. The tolerance for rounding is measured: the same pairs, each scored
        alone. A recurrent layer can see so little that it is within that tolerance, so the scores
        of the second answer must not move when the first one changes.
        """
        if not self.shares:
            return False
        few = self.pairs[:CHECKED_PAIRS]
        model: Any = self.model
        vocabulary = model.config.get_text_config().vocab_size
        changed = [
            TokenPair(
                prompt_ids=pair["prompt_ids"],
                chosen_ids=[(token + 1) % vocabulary for token in pair["chosen_ids"]],
                rejected_ids=pair["rejected_ids"],
            )
            for pair in few
        ]
        swapped = [
            TokenPair(
                prompt_ids=pair["prompt_ids"],
                chosen_ids=pair["rejected_ids"],
                rejected_ids=pair["chosen_ids"],
            )
            for pair in few
        ]
        with without_dropout(self.model), torch.no_grad(), self.accelerator.autocast():
            theirs = self.answer_scores(few, False)
            alone = [self.answer_scores([pair], False) for pair in few]
            try:
                ours = self.answer_scores(few, True)
                other_order = self.answer_scores(swapped, True)
                other_first = self.answer_scores(changed, True)
            except (RuntimeError, ValueError, TypeError, KeyError):
                self.shares = False  # the model does not accept such a mask
                return False
        noise = _mean_difference(theirs, [scores[side] for side in (0, 1) for scores in alone])
        back = other_order[len(few) :] + other_order[: len(few)]
        difference = max(_mean_difference(ours, theirs), _mean_difference(ours, back))
        rounding = ROUNDING_A_TOKEN if half_precision(self) else EXACT_A_TOKEN
        count = len(few)
        own = _mean_difference(ours[:count], other_first[:count])
        leak = _mean_difference(ours[count:], other_first[count:]) / max(own, 1e-12)
        self.shares = difference <= max(rounding, TIMES_NOISE * noise) and leak <= MAX_LEAK
        self.sharing = SharingMetrics(
            sharing_difference=round(difference, 6),
            sharing_noise=round(noise, 6),
            sharing_leak=round(leak, 6),
        )
        return self.shares


def _mean_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the mean absolute difference of the tokens' log-probabilities in nats."""
    return float((torch.cat(one) - torch.cat(other)).abs().mean())
