"""The asset `answers`: what base, prompted base, SFT and DPO answer to the held-out rows."""

from pathlib import Path

import dagster as dg

from ft_assets.assets.dpo_adapter import has_preferences
from ft_assets.assets.judged import (
    TRAINED,
    asked_inputs,
    asking,
    base_models_that_answer,
    judged,
    optional_stages,
)
from ft_assets.config import settings_version
from ft_assets.evaluation.rival_answers import TABLE
from ft_assets.evaluation.setting_files import read_schema
from ft_assets.orchestration.declarations import Metrics, asset
from ft_assets.orchestration.materializer import Materializer, result
from ft_assets.steps import answers as answers_step


def _summary(metrics: Metrics) -> str:
    return f"{metrics['candidates']} on {metrics['heldout_rows']} held-out rows"


def _as_rivals(materializer: Materializer) -> tuple[Path, ...]:
    """Return the tables of what base models have answered as rivals of others."""
    project, store = materializer.project, materializer.store
    if not base_models_that_answer(project):
        return ()
    current = [store.current("rival_answers", name) for name in project.base_models]
    return tuple(one.path / TABLE for one in current if one)


@asset(
    deps=[*TRAINED, "raw_dataset"],
    also=optional_stages,
    group="evaluation",
    kinds=["parquet"],
    code_version=answers_step.VERSION,
    gpu=True,
    summary=_summary,
)
def answers(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The answers and losses of every candidate, without scores: `eval_report` scores them.

    An answer of the last version is kept if weights and prompt are the same.
    """
    name, project = context.partition_key, materializer.project
    used, _ = judged(materializer, "answers", name)
    previous = materializer.store.current("answers", name)
    decisive, settings = asking(materializer, name), project.recipe(name).evaluation
    candidates = {"base": used["base_model"], "sft": used["lora_adapter"]}
    if has_preferences(used["dpo_adapter"].metrics):
        candidates["dpo"] = used["dpo_adapter"]
    if "rl_adapter" in used:
        candidates["rl"] = used["rl_adapter"]
    base = used["base_model"].data_version
    artifact, reused = materializer.materialize(
        context,
        identity=decisive,
        inputs=asked_inputs(materializer, used),
        step=lambda: answers_step.Settings(
            evaluation=settings,
            few_shot_system=project.data.few_shot_system,
            seeds=project.gate.seeds,
            few_shot_auto=project.data.few_shot_auto,
            answer_schema=read_schema(project, settings),
            weights={
                candidate: settings_version([base, artifact.data_version])
                for candidate, artifact in candidates.items()
            },
            harness=settings_version(
                [decisive["harness"], settings.lm_eval, settings.lm_eval_limit]
            ),
            root=project.root,
            previous=previous.path if previous else None,
            **({"rivals": rivals} if (rivals := _as_rivals(materializer)) else {}),
        ),
        libraries="infer",
    )
    every_row = dg.MetadataValue.path(str(artifact.path / "heldout.parquet"))
    first = ("candidates", "heldout_rows", "retention_rows")
    return result(artifact, reused, first, every_row=every_row)
