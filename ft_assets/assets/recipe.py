"""The asset `recipe`: the resolved settings of one base model."""

from pathlib import Path

import dagster as dg

from ft_assets.config import settings_version
from ft_assets.job import StepResult
from ft_assets.orchestration.declarations import asset
from ft_assets.orchestration.materializer import Materializer, result
from ft_assets.release.signing import Signing


@asset(group="model", kinds=["json"], code_version="1")
def recipe(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The settings of this base model: the defaults of finetune.yaml with the model's overrides."""
    # Here, because hours of training come before the first signature.
    Signing.of(materializer.project, None, "release.signing")
    resolved = materializer.project.recipe(context.partition_key)
    sections = {
        name: settings_version(getattr(resolved, name)) for name in type(resolved).model_fields
    }

    def make(output: Path) -> StepResult:
        (output / "recipe.json").write_text(resolved.model_dump_json(indent=1))
        return StepResult({}, sections)

    settings = resolved.model_dump(mode="json")
    artifact, reused = materializer.materialize(context, identity=settings, make=make)
    return result(artifact, reused, recipe=dg.MetadataValue.json(settings))
