"""The asset `recipe`: the resolved settings of one base model."""

import json
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
from pydantic import JsonValue

from ft_assets.config import settings_version
from ft_assets.job import StepResult
from ft_assets.markdown import table
from ft_assets.models.targets import require_targets
from ft_assets.orchestration.declarations import asset
from ft_assets.orchestration.materializer import Materializer, result
from ft_assets.release.signing import Signing

CELL = 200  # characters of a value; recipe.json has all of it


@asset(group="model", kinds=["json"], code_version="1")
def recipe(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The settings of this base model: the defaults of finetune.yaml with the model's overrides."""
    # Here, because hours of training come before the first signature.
    Signing.of(materializer.project, None, "release.signing")
    resolved = materializer.project.recipe(context.partition_key)
    if base := materializer.store.current("base_model", context.partition_key):
        require_targets(base.path, resolved.lora)
    sections = {
        name: settings_version(getattr(resolved, name)) for name in type(resolved).model_fields
    }

    def make(output: Path) -> StepResult:
        (output / "recipe.json").write_text(resolved.model_dump_json(indent=1))
        return StepResult({}, sections)

    settings = resolved.model_dump(mode="json")
    artifact, reused = materializer.materialize(context, identity=settings, make=make)
    shown = {
        name: dg.MetadataValue.md(settings_table(section)) for name, section in settings.items()
    }
    return result(artifact, reused, (), **shown)


def settings_table(section: JsonValue) -> str:
    """Return the settings of a section as a table, with nested keys by their paths."""
    rows = [[f"`{key}`", _cell(value)] for key, value in _leaves("", section)]
    return table(["key", "value"], rows)


def _leaves(path: str, value: JsonValue) -> Iterator[tuple[str, JsonValue]]:
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, inner in value.items():
        yield from _leaves(f"{path}.{key}" if path else key, inner)


def _cell(value: JsonValue) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "–" if value is None else f"{text[:CELL]}…" if len(text) > CELL else text
