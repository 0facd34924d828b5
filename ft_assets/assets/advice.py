"""The asset `advice`: whether to fine-tune at all, measured before a training."""

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.judged import (
    answering,
    document_versions,
    rival_documents,
    scoring,
)
from ft_assets.assets.own_rehearsal import own_rehearsal_of, own_rehearsal_stage
from ft_assets.config import AdviseSettings, BaseRival
from ft_assets.evaluation.advice import ADVICE, Advice
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import WARN, Materializer, result
from ft_assets.steps import advise
from ft_assets.steps.answers import base_version


def _summary(metrics: Metrics) -> str:
    return f"{metrics['outcome']}, by {metrics['sampled']} train rows"


@asset(
    deps=["base_model", "raw_dataset", "raw_preferences", "heldout_split"],
    group="evaluation",
    kinds=["report"],
    code_version="2",
    gpu=True,
    summary=_summary,
    only_if=lambda project: project.advise is not None,
    also=own_rehearsal_stage("own_rehearsal"),
)
def advice(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """Prompt, retrieve, more rows, another base, or fine-tune: by a sample of train rows.

    The base answers them alone, with examples, and with the documents of rivals. No held-out row
    takes part.
    """
    name, project, store = context.partition_key, materializer.project, materializer.store
    base, split = store.need("base_model", name), store.need("heldout_split", name)
    raw, pairs = store.need("raw_dataset", None), store.need("raw_preferences", None)
    evaluation = project.recipe(name).evaluation
    own, others = _documents(materializer, name)
    decisive = {
        **scoring(project, evaluation),
        "advise": (project.advise or AdviseSettings()).model_dump(mode="json"),
        "few_shot_system": project.data.few_shot_system,
        "heldout_groups": split.metrics.get("heldout_groups", split.metrics["heldout_rows"]),
        "min_heldout": project.gate.min_heldout_rows,
        "pairs": pairs.metrics.get("preferences_rows", 0),
        "documents": document_versions(own),
        "not_asked": others,
    }
    answers = store.current("answers", name)
    artifact, reused = materializer.materialize(
        context,
        identity=decisive,
        inputs={
            "base_model": (base, None),
            "heldout_split#train": (split, "train"),
            **{f"raw_dataset#{part}": (raw, part) for part in ("few_shot", "rehearsal")},
            **own_rehearsal_of(materializer, name),
        },
        step=lambda: advise.Settings(
            advise=project.advise or AdviseSettings(),
            evaluation=evaluation,
            few_shot_system=project.data.few_shot_system,
            answer_schema=decisive["schema"],
            documents=own,
            not_asked=others,
            heldout_groups=decisive["heldout_groups"],
            min_heldout=decisive["min_heldout"],
            pairs=decisive["pairs"],
            base_version=base_version(base.data_version),
            answers=answers.path if answers else None,
            root=project.root,
        ),
        libraries="infer",
    )
    return result(
        artifact,
        reused,
        first=("outcome", "sampled"),
        advice=dg.MetadataValue.md((artifact.path / advise.TEXT).read_text()),
        every_row=dg.MetadataValue.path(str(artifact.path / advise.ROWS)),
    )


def _documents(materializer: Materializer, name: str):
    """Return the documents of the rivals that the base answers for, and why others are not asked.

    An endpoint costs money, and another base model is another load.
    """
    project = materializer.project
    own, others = {}, dict[str, str]()
    for rival, files in rival_documents(project, name).items():
        answerer = answering(project, name, rival)
        if isinstance(answerer, BaseRival) and answerer.base_model == name:
            own[rival] = files
        else:
            others[rival] = "another model answers; the report compares it on held-out rows"
    return own, others


def read_advice(artifact: Artifact) -> Advice:
    """Read the advice."""
    return Advice.read(artifact.path / ADVICE)


@check(advice, description="The sample of train rows supports a fine-tune.")
def fine_tune_is_advised(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the outcome if it is another one."""
    found = read_advice(checked.artifact)
    last = found.nodes[-1]
    return dg.AssetCheckResult(
        passed=found.outcome == "fine-tune",
        severity=WARN,
        description=f"{found.headline()} {last.question} {last.decision}; what would change it: "
        f"{last.change}",
    )
