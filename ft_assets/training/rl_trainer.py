"""TRL's GRPOTrainer and RLOOTrainer for tokenized prompts, sampled by our seeded rule.

The answers of a step depend on the policy, the seed, the step and the place in the step, so a
resumed training samples what it would have sampled. The reference of the KL divergence is a frozen
copy of the SFT adapter.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from ft_assets.compat.trl import drop_reference_copy, reference_name
from ft_assets.inference.generation import Answer, generate
from ft_assets.inference.sampling import Sampling
from ft_assets.training.dropout import turn_off_dropout
from ft_assets.training.prepare import full_precision_adapter
from ft_assets.training.prompt_order import PromptOrder
from ft_assets.training.trl_options import ReportsTrlErrors
from ft_assets.training.validation import LogsValidation

UNFINISHED = 1.0  # what an answer that does not stop loses: the range of most metrics


@dataclass(frozen=True)
class Prompt:
    """A row to sample answers to: its id, and the token ids of its prompt and of its reference."""

    id: str
    ids: list[int]
    reference_ids: list[int]


@dataclass(frozen=True)
class Given:
    """An answer to score: the id of its row, its text, and whether it stopped by itself."""

    id: str
    text: str
    stopped: bool


@dataclass(frozen=True)
class Reward:
    """A reward with its weight. `score` returns a number for each answer; higher is better."""

    name: str
    weight: float
    score: Callable[[Sequence[Given]], list[float]]

    def of_groups(self, answers: Sequence[Given]) -> list[float]:
        """Score answers. One that does not stop gets a worse score than any to its row."""
        return self.punished(answers, self.score(answers))

    def punished(self, answers: Sequence[Given], scores: Sequence[float]) -> list[float]:
        """Return the scores of answers, with that of one that does not stop beyond the worst.

        With the worst score itself, a policy that never stops was not pulled back. With a negative
        weight the worst score is the highest.
        """
        sign = math.copysign(1.0, self.weight)
        worst: dict[str, float] = {}
        for answer, score in zip(answers, scores, strict=True):
            worst[answer.id] = min(sign * score, worst.get(answer.id, sign * score))
        return [
            score if answer.stopped else sign * (worst[answer.id] - UNFINISHED)
            for answer, score in zip(answers, scores, strict=True)
        ]


@dataclass
class Rollout:
    """Samples the policy, and counts what it sampled: tokens and seconds."""

    tokenizer: Any
    stops: frozenset[int]
    max_new_tokens: int
    temperature: float
    seed: int
    batch_size: int | None = None
    told: Callable[[str], object] = lambda _: None  # gets why sampling is slow
    tokens: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def answers(
        self, trainer: Any, prompts: list[list[int]], sampled: Sequence[str] = ()
    ) -> list[Answer]:
        """Return the policy's answers: greedy ones, or those of the keys in `sampled`."""
        model, training, begun = trainer.model, trainer.model.training, time.perf_counter()
        sampling = Sampling(self.temperature, 1.0, self.seed, sampled) if sampled else None
        try:
            with trainer.accelerator.autocast():
                found = generate(
                    model,
                    self.tokenizer,
                    prompts,
                    self.stops,
                    self.max_new_tokens,
                    self.batch_size,
                    told=self.told,
                    sampling=sampling,
                )
        finally:
            model.train(training)
        self.tokens += sum(len(answer.ids) for answer in found)
        self.seconds += time.perf_counter() - begun
        return found


class _SamplesItself(LogsValidation, ReportsTrlErrors):
    """Mixin before a TRL trainer that samples: tokenized prompts, our sampler, a proven reference.

    `sft`: the weights of the SFT adapter by name, as the reference has them.
    """

    key = "rl"

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        prompts: Sequence[Prompt],
        rewards: Sequence[Reward],
        rollout: Rollout,
        sft: dict[str, torch.Tensor],
    ) -> None:
        self.prompts, self.rollout = {prompt.id: prompt for prompt in prompts}, rollout
        now = {name: weight.data for name, weight in model.named_parameters() if name in sft}
        drop_reference_copy(model)  # that of a trainer before, after memory ran out
        options: dict[str, Any] = {
            "model": model,
            "args": args,
            "reward_funcs": [_of_trl(reward, self) for reward in rewards],
            "train_dataset": Dataset.from_dict({"prompt": [prompt.id for prompt in prompts]}),
            "processing_class": rollout.tokenizer,
        }
        super().__init__(**options)
        turn_off_dropout(model)  # of the reference, too: the policy is trained as it answers
        full_precision_adapter(model, now)
        weights = dict(model.named_parameters())
        for name, weight in sft.items():  # TRL has copied the policy of now
            reference = weights[reference_name(name)]
            reference.data = weight.to(reference.device, torch.float32, copy=True)
        self.eos_token_ids = sorted(rollout.stops)

    def _get_train_sampler(  # pyright: ignore[reportIncompatibleMethodOverride]  (TRL's name)
        self: Any, dataset: Any = None
    ) -> PromptOrder:
        args = self.args
        return PromptOrder(
            len(self.train_dataset),
            args.generation_batch_size // args.num_generations,
            args.num_generations,
            args.steps_per_generation,
            args.seed,
        )

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.prompts[identity].ids for identity in prompts], None, {}

    def _sampled(self: Any, prompt_ids: list[list[int]]) -> list[list[int]]:
        keys = [f"{self.state.global_step}/{place}" for place in range(len(prompt_ids))]
        return [list(answer.ids) for answer in self.rollout.answers(self, prompt_ids, keys)]

    def given(self, identities: Sequence[str], ids: Sequence[Sequence[int]]) -> list[Given]:
        """Return sampled answers, given as their tokens, to score."""
        decode, stops = self.rollout.tokenizer.decode, self.rollout.stops
        found = []
        for identity, tokens in zip(identities, ids, strict=True):
            stopped = bool(tokens) and tokens[-1] in stops
            text = decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True)
            found.append(Given(identity, text, stopped))
        return found


def _of_trl(reward: Reward, trainer: Any) -> Callable[..., list[float]]:
    """Return a reward as TRL calls it."""

    def score(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return reward.of_groups(trainer.given(prompts, completion_ids))

    score.__name__ = reward.name
    return score


class GroupTrainer(_SamplesItself, GRPOTrainer):
    """GRPO (Shao et al. 2024)."""

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return self._sampled(prompt_ids), None


class LeaveOneOutTrainer(_SamplesItself, RLOOTrainer):
    """RLOO (Ahmadian et al. 2024)."""

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return self._sampled(prompt_ids)
