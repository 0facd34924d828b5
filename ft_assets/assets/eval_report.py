"""The asset that judges, eval_report, and its checks."""

import json
from typing import Any

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.raw_data import OWNERS
from ft_assets.config import settings_version
from ft_assets.evaluation.sources import own_metric_version, read_schema
from ft_assets.evaluation.verdict.decision import PASS, beats, decide, dpo_hurts, forgetting, said
from ft_assets.evaluation.verdict.gate import bound_versions, require_lineage
from ft_assets.orchestration.materializer import (
    ERROR,
    GPU_POOL,
    WARN,
    Materializer,
    result,
    tag_run,
    user_errors,
)

TRAINED = [
    dg.AssetKey(name)
    for name in ("base_model", "recipe", "heldout_split", "lora_adapter", "dpo_adapter")
]


def judged(
    materializer: Materializer, asset: str, name: str
) -> tuple[dict[str, Artifact], dict[str, str]]:
    """Return the artifacts that a verdict is about, and their versions. Raises VerdictError if they do not belong together."""
    names = ("base_model", "chat_dataset", "heldout_split", "lora_adapter", "dpo_adapter")
    used = {made: materializer.store.need(made, name) for made in names}
    require_lineage(used, f"{asset}[{name}]")
    return used, bound_versions(used, settings_version(_evaluation(materializer, name)))


def _evaluation(materializer: Materializer, name: str) -> dict[str, Any]:
    """Return all that decides the evaluation but for the artifacts: its settings, the files they name, the few-shot prompt."""
    project = materializer.project
    settings = project.recipe(name).evaluation
    return {
        "evaluation": settings.model_dump(mode="json"),
        "schema": read_schema(project, settings),
        "own_metric": own_metric_version(project, settings),
        "few_shot_system": project.data.few_shot_system,
        "few_shot": materializer.store.need("raw_dataset", None).part_version("few_shot"),
    }


def _report(materializer: Materializer, name: str) -> dict[str, Any]:
    return json.loads(
        (materializer.store.need("eval_report", name).path / "report.json").read_text()
    )


def numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a paired difference as check metadata: the UI plots it over runs."""
    return {
        "difference": entry["mean"],
        "interval_low": entry["low"],
        "interval_high": entry["high"],
    }


def evaluation_assets(
    base_models: dg.PartitionsDefinition,
) -> tuple[list[dg.AssetsDefinition], list[dg.AssetChecksDefinition]]:
    """Return eval_report and its checks, partitioned by base model."""

    @dg.asset(
        partitions_def=base_models,
        deps=[*TRAINED, dg.AssetKey("raw_dataset")],
        group_name="evaluation",
        owners=OWNERS,
        kinds={"report"},
        code_version="4",
        pool=GPU_POOL,
    )
    def eval_report(
        context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.MaterializeResult:
        """Base, prompted base, SFT and DPO on the same held-out rows, paired; general prompts; and the verdict."""
        name, project = context.partition_key, materializer.project
        with user_errors():
            used, versions = judged(materializer, "eval_report", name)
            previous = materializer.store.current("eval_report", name)
            artifact, reused = materializer.materialize(
                context,
                settings={
                    **_evaluation(materializer, name),
                    "gate": project.gate.model_dump(
                        mode="json", exclude={"override", "min_top1_agreement"}
                    ),
                    "has_dpo": used["dpo_adapter"].metrics["pairs"] > 0,
                },
                inputs={
                    **{
                        asset: (used[asset], None)
                        for asset in ("base_model", "lora_adapter", "dpo_adapter")
                    },
                    **{
                        f"heldout_split#{part}": (used["heldout_split"], part)
                        for part in ("train", "heldout", "retention")
                    },
                    "raw_dataset#few_shot": (
                        materializer.store.need("raw_dataset", None),
                        "few_shot",
                    ),
                },
                step="evaluate",
                step_settings={
                    "bound_to": versions,
                    "root": str(project.root),
                    "previous": str(previous.path) if previous else None,
                },
                libraries="infer",
            )
            picture = (artifact.path / "info" / "scores.txt").read_text()
            text, since = (
                (artifact.path / name).read_text() for name in ("report.md", "info/changes.md")
            )
            return result(
                artifact,
                reused,
                report=dg.MetadataValue.md(f"![scores]({picture})\n\n{text}"),
                since_the_previous_report=dg.MetadataValue.md(since),
                page=dg.MetadataValue.path(str(artifact.path / "info" / "report.html")),
                every_row=dg.MetadataValue.path(str(artifact.path / "rows.parquet")),
            )

    @dg.asset_check(
        asset=eval_report,
        blocking=True,
        partitions_def=base_models,
        description="Held-out quality is above the base's, proven: the verdict is PASS.",
    )
    @user_errors()
    def better_than_base(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Fail on FAIL and on INCONCLUSIVE."""
        report = _report(materializer, context.partition_key)
        verdict = decide(report, materializer.project.gate)
        tag_run(context, verdict=verdict["status"], base_model=context.partition_key)
        blocking = ERROR if materializer.project.gate.override is None else WARN
        return dg.AssetCheckResult(
            passed=verdict["status"] == PASS,
            severity=blocking,
            description=f"{verdict['status']}: {'; '.join(verdict['reasons'])}",
            metadata=numbers(report["comparisons"][verdict["speaker"]]["base"][report["metric"]]),
        )

    @dg.asset_check(
        asset=eval_report,
        partitions_def=base_models,
        description="The fine-tune beats the base with a few-shot prompt; else prompting would do.",
    )
    @user_errors()
    def better_than_prompting(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Warn if a prompted base is as good; fail if gate.prompting says so."""
        report, gate = _report(materializer, context.partition_key), materializer.project.gate
        speaker, metric = decide(report, gate)["speaker"], report["metric"]
        severity = ERROR if gate.prompting == "fail" and gate.override is None else WARN
        if "few_shot" not in report["scores"]:
            return dg.AssetCheckResult(
                passed=False,
                severity=severity,
                description="not compared: data.few_shot names no examples",
            )
        entry = report["comparisons"][speaker]["few_shot"][metric]
        passed = beats(entry, gate.confidence)
        text = f"{speaker}: {said(metric, entry, 'the few-shot prompt')}"
        return dg.AssetCheckResult(
            passed=passed,
            severity=severity,
            description=text
            if passed
            else f"you do not need this fine-tune, or cannot show that you do: {text}",
            metadata=numbers(entry),
        )

    @dg.asset_check(
        asset=eval_report,
        blocking=True,
        partitions_def=base_models,
        description="The model to merge did not get worse on general prompts.",
    )
    @user_errors()
    def nothing_forgotten(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Fail if loss or task score on the retention set fell by more than the gate's tolerance, or that cannot be told."""
        report, gate = _report(materializer, context.partition_key), materializer.project.gate
        speaker = decide(report, gate)["speaker"]
        fails, unsure, proven = forgetting(speaker, report, gate)
        if not (fails or unsure or proven):
            return dg.AssetCheckResult(
                passed=False,
                severity=WARN,
                description="not measured: data.retention names no prompts",
            )
        return dg.AssetCheckResult(
            passed=not fails and not unsure,
            severity=ERROR if gate.override is None else WARN,
            description=f"{speaker}: {'; '.join(fails or unsure or proven)}",
            metadata=numbers(report["retention"]["comparisons"][speaker]["base"]["loss"])
            if report["retention"]
            else {},
        )

    @dg.asset_check(
        asset=eval_report,
        partitions_def=base_models,
        description="DPO is not worse than SFT; else SFT is merged.",
    )
    @user_errors()
    def dpo_does_not_hurt(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Warn if DPO is lower than SFT on held-out or on general prompts."""
        report = _report(materializer, context.partition_key)
        if "dpo" not in report["scores"]:
            return dg.AssetCheckResult(passed=True, description="no preference data: no DPO")
        entry, metric = report["comparisons"]["dpo"]["sft"][report["metric"]], report["metric"]
        hurts = dpo_hurts(report, materializer.project.gate)
        return dg.AssetCheckResult(
            passed=hurts is None,
            severity=WARN,
            description=hurts or f"dpo: {said(metric, entry, 'SFT')}",
            metadata=numbers(entry),
        )

    return [eval_report], [
        better_than_base,
        better_than_prompting,
        nothing_forgotten,
        dpo_does_not_hurt,
    ]
