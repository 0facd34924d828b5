"""Step: train by reinforcement from the SFT adapter, on rewards of the policy's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import JsonValue

from ft_assets.config import EvaluationSettings, LoraSettings, RlSettings
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import TokenizedRow
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.evaluation.own_prompts import AskedPrompt
    from ft_assets.evaluation.own_scores import OwnScores
    from ft_assets.metrics import Metric
    from ft_assets.training.rl_trainer import Given, Prompt, Reward


class Settings(StepSettings):
    """`answer_schema`: of `evaluation.json_schema`. `root`: the folder of finetune.yaml."""

    STEP: ClassVar = Step("rl", gpu=True)

    lora: LoraSettings
    rl: RlSettings
    evaluation: EvaluationSettings
    answer_schema: dict[str, JsonValue] | None = None
    root: Path
    memory_limit_gb: float | None = None
    seeds: int = 1


@takes(Settings)
def step(job: Job, given: Settings, report: Report) -> StepResult:
    from ft_assets.evaluation.own_prompts import own_prompts, own_rows
    from ft_assets.evaluation.own_scores import OwnScores
    from ft_assets.models.adapter_files import of_seed, save_groups
    from ft_assets.models.loading import load_tokenizer, stop_ids
    from ft_assets.training.rl import train_rl

    snapshot, settings = job.inputs["base_model"], given.evaluation
    rows: list[TokenizedRow] = own_rows(job.inputs, "train", given.rl.max_prompts)
    watched = own_rows(job.inputs, "validation", given.rl.max_prompts)
    tokenizer, stops = load_tokenizer(snapshot), stop_ids(snapshot)
    prompts, validation = (
        own_prompts(snapshot, tokenizer, stops, its, settings.max_new_tokens)
        for its in (rows, watched)
    )
    scores = OwnScores(settings, given.answer_schema, given.root)
    weights = settings.rewards(given.rl.rewards)
    every = [*prompts, *validation]
    rewards = [_reward(metric, weight, scores, every) for metric, weight in weights.items()]
    found = []
    for number in range(given.seeds):
        sft_adapter = of_seed(job.inputs["lora_adapter"], number)
        output = of_seed(job.output, number)
        output.mkdir(parents=True, exist_ok=True)
        metrics = train_rl(
            snapshot=snapshot,
            sft_adapter=sft_adapter,
            prompts=_tokens(prompts),
            validation=_tokens(validation),
            rewards=rewards,
            watched=_watched(settings, weights, scores, every),
            lora=given.lora,
            rl=given.rl.model_copy(update={"seed": given.rl.seed + number}),
            max_new_tokens=settings.max_new_tokens,
            checkpoints=of_seed(job.checkpoints, number),
            output=output,
            report=report,
            memory_limit_gb=given.memory_limit_gb,
            batch_size=settings.batch_size,
        )
        save_groups(rows, output, before=sft_adapter)
        found.append(metrics)
    return StepResult(found[0])


def _tokens(prompts: Sequence[AskedPrompt]) -> list[Prompt]:
    from ft_assets.training.rl_trainer import Prompt

    return [Prompt(one.row["id"], one.prompt, one.reference_ids) for one in prompts]


def _reward(
    metric: Metric, weight: float, scores: OwnScores, prompts: Sequence[AskedPrompt]
) -> Reward:
    """Return a metric as a reward, with its sign, so that higher is better."""
    from ft_assets.training.rl_trainer import Reward

    rows = {one.row["id"]: one.row for one in prompts}
    sign = 1 if metric.higher_is_better else -1

    def score(answers: Sequence[Given]) -> list[float]:
        answered = [(rows[answer.id], answer.text) for answer in answers]
        return [sign * value for value in scores.of(metric, answered)]

    return Reward(metric.name, weight, score)


def _watched(
    settings: EvaluationSettings,
    rewards: dict[Metric, float],
    scores: OwnScores,
    prompts: Sequence[AskedPrompt],
) -> list[Reward]:
    """Return the verdict's metric, to be measured on validation rows, unless it is a reward."""
    metric = settings.main_metric()
    if metric in rewards or not settings.scores_alone():
        return []
    return [_reward(metric, 1.0, scores, prompts)]


if __name__ == "__main__":
    main(step)
