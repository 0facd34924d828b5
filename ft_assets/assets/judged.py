"""What is judged: the artifacts behind a verdict, their versions, and what decides the scores."""

from typing import Any

from ft_assets.artifacts import Artifact
from ft_assets.config import EvaluationSettings, Project, settings_version
from ft_assets.errors import VerdictError
from ft_assets.evaluation.setting_files import (
    harness_version,
    metric_packages,
    program_version,
    read_schema,
    user_metric_version,
)
from ft_assets.evaluation.verdict.gate import bound_versions, require_lineage
from ft_assets.orchestration.materializer import Inputs, Materializer

TRAINED = ("base_model", "recipe", "heldout_split", "lora_adapter", "dpo_adapter")


def judged(
    materializer: Materializer, asset: str, name: str
) -> tuple[dict[str, Artifact], dict[str, str]]:
    """Return the artifacts of a verdict and their versions.

    Raises VerdictError if they were not made from each other.
    """
    names = ("base_model", "chat_dataset", "heldout_split", "lora_adapter", "dpo_adapter")
    used = {made: materializer.store.need(made, name) for made in names}
    require_lineage(used, f"{asset}[{name}]")
    return used, bound_versions(used, settings_version(evaluation_identity(materializer, name)))


def asking(materializer: Materializer, name: str) -> dict[str, Any]:
    """Return all that decides what the candidates are asked, besides the artifacts."""
    project = materializer.project
    settings = project.recipe(name).evaluation
    return {
        "evaluation": settings.asked(),
        "harness": harness_version(project, settings),
        "few_shot_system": project.data.few_shot_system,
        **({"few_shot_auto": _scoring(project, settings)} if project.data.few_shot_auto else {}),
        **({"seeds": project.gate.seeds} if project.gate.seeds > 1 else {}),
    }


def _scoring(project: Project, settings: EvaluationSettings) -> dict[str, Any]:
    """Return all that decides the scores of answers."""
    return {
        "evaluation": settings.model_dump(mode="json"),
        "schema": read_schema(project, settings),
        "own_metric": user_metric_version(project, settings),
        "program": program_version(project, settings),
        "packages": metric_packages(settings),
    }


def asked_inputs(materializer: Materializer, used: dict[str, Artifact]) -> Inputs:
    """Return the inputs of the answers."""
    trained = ("base_model", "lora_adapter", "dpo_adapter")
    validation = ("validation",) if materializer.project.data.few_shot_auto else ()
    return {
        **{asset: (used[asset], None) for asset in trained},
        **{
            f"heldout_split#{part}": (used["heldout_split"], part)
            for part in ("train", "heldout", "retention", *validation)
        },
        "raw_dataset#few_shot": (materializer.store.need("raw_dataset", None), "few_shot"),
    }


def answers_of_today(materializer: Materializer, name: str, used: dict[str, Artifact]) -> Artifact:
    """Return the answers. Raises VerdictError if they were asked under other circumstances."""
    answers = materializer.store.need("answers", name)
    then, settings = answers.manifest.inputs, answers.manifest.settings
    changed = [
        source.partition("#")[0]
        for source, (artifact, part) in asked_inputs(materializer, used).items()
        if then.get(source) != artifact.part_version(part)
    ]
    today = asking(materializer, name)
    changed += [
        f"setting {key}" for key in {**settings, **today} if settings.get(key) != today.get(key)
    ]
    if changed:
        raise VerdictError(
            where=f"eval_report[{name}]",
            found=f"answers was made from another {changed[0]}",
            expected="the answers of today's base, adapters, rows and settings",
            fix="materialize answers first (ft run)",
        )
    return answers


def evaluation_identity(materializer: Materializer, name: str) -> dict[str, Any]:
    """Return all that decides the evaluation besides the artifacts.

    It has the settings, the files that they name, the packages of the metrics, and the few-shot
    prompt.
    """
    project = materializer.project
    settings = project.recipe(name).evaluation
    return {
        **_scoring(project, settings),
        "harness": harness_version(project, settings),
        "few_shot_system": project.data.few_shot_system,
        "few_shot": materializer.store.need("raw_dataset", None).part_version("few_shot"),
        **({"few_shot_auto": True} if project.data.few_shot_auto else {}),
    }
