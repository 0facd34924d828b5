"""The asset `base_model`: the resolved base as a bf16 snapshot."""

import dagster as dg

from ft_assets.models.source import read_template, source_identity
from ft_assets.orchestration.declarations import Metrics, asset
from ft_assets.orchestration.materializer import Materializer, result
from ft_assets.steps import base_model as base_model_step


def _summary(metrics: Metrics) -> str:
    return f"{metrics['parameters'] / 1e6:,.1f}M parameters"


@asset(group="model", kinds=["huggingface"], code_version="7", summary=_summary)
def base_model(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The resolved base: a bf16 snapshot with tokenizer and chat template.

    The source is a hub commit, a folder or a GGUF file.
    """
    project, name = materializer.project, context.partition_key
    source, recipe = project.base_model(name), project.recipe(name)
    chat = recipe.chat
    template = read_template(name, chat.chat_template, project.root)
    identity = source_identity(name, source, project.root)
    artifact, reused = materializer.materialize(
        context,
        identity={
            "identity": identity,
            "template": template,
            "trust_remote_code": source.trust_remote_code,
            "baked": chat.baked(),
        },
        step=base_model_step.Settings(
            model=source,
            chat=chat,
            root=project.root,
            identity=identity,
            template=template,
            lora=recipe.lora,
        ),
        libraries="text",
        space=1_000_000_000,
    )
    named = source.hub or source.gguf or source.folder
    first = ("architecture", "parameters", "context")
    return result(artifact, reused, first, source=str(named), commit=identity.get("commit", "–"))
