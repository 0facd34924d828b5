"""Assets that judge and release: eval_report, merged_model, leaderboard."""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.data import OWNERS
from ft_assets.assets.training import ERROR, GPU_POOL, WARN
from ft_assets.assets.workshop import Workshop, library_versions, result, user_errors
from ft_assets.config import settings_version
from ft_assets.evaluation.gate import bound_versions, require_lineage, require_pass
from ft_assets.evaluation.sources import own_metric_version, read_schema
from ft_assets.evaluation.verdict import PASS, beats, decide, dpo_hurts, forgetting, said
from ft_assets.job import StepResult


def _judged(workshop: Workshop, name: str) -> tuple[dict[str, Artifact], dict[str, str]]:
    """Return the artifacts that a verdict is about, and their versions. Raises VerdictError if they do not belong together."""
    names = ("base_model", "chat_dataset", "heldout_split", "lora_adapter", "dpo_adapter")
    used = {asset: workshop.store.need(asset, name) for asset in names}
    require_lineage(used, f"eval_report[{name}]")
    return used, bound_versions(used, settings_version(_evaluation(workshop, name)))


def _evaluation(workshop: Workshop, name: str) -> dict[str, Any]:
    """Return all that decides the evaluation but for the artifacts: its settings, the files they name, the few-shot prompt."""
    project = workshop.project
    settings = project.recipe(name).evaluation
    return {
        "evaluation": settings.model_dump(mode="json"),
        "schema": read_schema(project, settings),
        "own_metric": own_metric_version(project, settings),
        "few_shot_system": project.data.few_shot_system,
        "few_shot": workshop.store.need("raw_dataset", None).part_version("few_shot"),
    }


def _report(workshop: Workshop, name: str) -> dict[str, Any]:
    return json.loads((workshop.store.need("eval_report", name).path / "report.json").read_text())


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a paired difference as check metadata: the UI plots it over runs."""
    return {"difference": entry["mean"], "interval_low": entry["low"], "interval_high": entry["high"]}


def release_assets(base_models: dg.PartitionsDefinition) -> tuple[list[dg.AssetsDefinition], list[dg.AssetChecksDefinition]]:
    """Return the assets and checks; all but the leaderboard are partitioned by base model."""
    trained = [dg.AssetKey(name) for name in ("base_model", "recipe", "heldout_split", "lora_adapter", "dpo_adapter")]

    @dg.asset(
        partitions_def=base_models,
        deps=[*trained, dg.AssetKey("raw_dataset")],
        group_name="evaluation",
        owners=OWNERS,
        kinds={"report"},
        code_version="2",
        pool=GPU_POOL,
    )
    def eval_report(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """Base, prompted base, SFT and DPO on the same held-out rows, paired; general prompts; and the verdict."""
        name, project = context.partition_key, workshop.project
        with user_errors():
            used, versions = _judged(workshop, name)
            previous = workshop.store.current("eval_report", name)
            artifact, reused = workshop.materialize(
                context,
                settings={
                    **_evaluation(workshop, name),
                    "gate": project.gate.model_dump(mode="json", exclude={"override", "min_top1_agreement"}),
                    "has_dpo": used["dpo_adapter"].metrics["pairs"] > 0,
                },
                inputs={
                    **{asset: (used[asset], None) for asset in ("base_model", "lora_adapter", "dpo_adapter")},
                    **{f"heldout_split#{part}": (used["heldout_split"], part) for part in ("train", "heldout", "retention")},
                    "raw_dataset#few_shot": (workshop.store.need("raw_dataset", None), "few_shot"),
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
        text, since = ((artifact.path / name).read_text() for name in ("report.md", "info/changes.md"))
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
    def better_than_base(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Fail on FAIL and on INCONCLUSIVE."""
        report = _report(workshop, context.partition_key)
        verdict = decide(report, workshop.project.gate)
        blocking = ERROR if workshop.project.gate.override is None else WARN
        return dg.AssetCheckResult(
            passed=verdict["status"] == PASS,
            severity=blocking,
            description=f"{verdict['status']}: {'; '.join(verdict['reasons'])}",
            metadata=_numbers(report["comparisons"][verdict["speaker"]]["base"][report["metric"]]),
        )

    @dg.asset_check(
        asset=eval_report,
        partitions_def=base_models,
        description="The fine-tune beats the base with a few-shot prompt; else prompting would do.",
    )
    def better_than_prompting(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Warn if a prompted base is as good; fail if gate.prompting says so."""
        report, gate = _report(workshop, context.partition_key), workshop.project.gate
        speaker, metric = decide(report, gate)["speaker"], report["metric"]
        severity = ERROR if gate.prompting == "fail" and gate.override is None else WARN
        if "few_shot" not in report["scores"]:
            return dg.AssetCheckResult(passed=False, severity=severity, description="not compared: data.few_shot names no examples")
        entry = report["comparisons"][speaker]["few_shot"][metric]
        passed = beats(entry, gate.confidence)
        text = f"{speaker}: {said(metric, entry, 'the few-shot prompt')}"
        return dg.AssetCheckResult(
            passed=passed,
            severity=severity,
            description=text if passed else f"you do not need this fine-tune, or cannot show that you do: {text}",
            metadata=_numbers(entry),
        )

    @dg.asset_check(
        asset=eval_report, blocking=True, partitions_def=base_models, description="The model to merge did not get worse on general prompts."
    )
    def nothing_forgotten(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Fail if loss or task score on the retention set fell by more than the gate's tolerance, or that cannot be told."""
        report, gate = _report(workshop, context.partition_key), workshop.project.gate
        if report["retention"] is None:
            return dg.AssetCheckResult(passed=False, severity=WARN, description="not measured: data.retention names no prompts")
        speaker = decide(report, gate)["speaker"]
        fails, unsure, proven = forgetting(speaker, report, gate)
        return dg.AssetCheckResult(
            passed=not fails and not unsure,
            severity=ERROR if gate.override is None else WARN,
            description=f"{speaker}: {'; '.join(fails or unsure or proven)}",
            metadata=_numbers(report["retention"]["comparisons"][speaker]["base"]["loss"]),
        )

    @dg.asset_check(asset=eval_report, partitions_def=base_models, description="DPO is not worse than SFT; else SFT is merged.")
    def dpo_does_not_hurt(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Warn if DPO is lower than SFT on held-out or on general prompts."""
        report = _report(workshop, context.partition_key)
        if "dpo" not in report["scores"]:
            return dg.AssetCheckResult(passed=True, description="no preference data: no DPO")
        entry, metric = report["comparisons"]["dpo"]["sft"][report["metric"]], report["metric"]
        hurts = dpo_hurts(report, workshop.project.gate)
        return dg.AssetCheckResult(
            passed=hurts is None, severity=WARN, description=hurts or f"dpo: {said(metric, entry, 'SFT')}", metadata=_numbers(entry)
        )

    @dg.asset(
        partitions_def=base_models,
        deps=[*trained, eval_report],
        group_name="release",
        owners=OWNERS,
        kinds={"huggingface"},
        code_version="3",
        pool=GPU_POOL,
    )
    def merged_model(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """The bf16 model to serve: base + proven adapter, compared with them from disk. Exists only behind a PASS."""
        name, project, store = context.partition_key, workshop.project, workshop.store
        with user_errors():
            used, versions = _judged(workshop, name)
            report = store.current("eval_report", name)
            verdict = require_pass(report, versions, project.gate, f"merged_model[{name}]")
            assert report is not None
            adapter = used[f"{'dpo' if verdict['candidate'] == 'dpo' else 'lora'}_adapter"]
            settings = project.base_model(name)
            size = sum(entry["bytes"] for entry in used["base_model"].manifest["files"].values())
            artifact, reused = workshop.materialize(
                context,
                settings={
                    "candidate": verdict["candidate"],
                    "override": verdict.get("override"),
                    "gate": project.gate.model_dump(mode="json", include={"min_top1_agreement", "confidence", "min_stop_rate", "metrics"}),
                },
                inputs={
                    "base_model": (used["base_model"], None),
                    "adapter": (adapter, None),
                    "eval_report": (report, None),
                    "heldout_split#heldout": (used["heldout_split"], "heldout"),
                },
                step="merge",
                step_settings={
                    "verdict": verdict,
                    "evaluation": project.recipe(name).evaluation.model_dump(mode="json"),
                    "schema": read_schema(project, project.recipe(name).evaluation),
                    "root": str(project.root),
                    "source": str(settings.hub or settings.gguf or settings.folder),
                    "recipe": project.recipe(name).model_dump(mode="json"),
                    "versions": {**versions, **library_versions("train")},
                },
                libraries="infer",
                space=size + 100_000_000,
            )
        card = (artifact.path / "README.md").read_text().split("---", 2)[-1]
        return result(artifact, reused, model_card=dg.MetadataValue.md(card))

    @dg.asset_check(
        asset=merged_model,
        blocking=True,
        partitions_def=base_models,
        description="The merged model, read from disk, answers as base + adapter do.",
    )
    def merge_is_equivalent(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Fail below gate.min_top1_agreement, or if tokenizer or template differ."""
        metrics, least = workshop.store.need("merged_model", context.partition_key).metrics, workshop.project.gate.min_top1_agreement
        passed = metrics["top1_agreement"] >= least and metrics["same_tokenizer_and_template"]
        return dg.AssetCheckResult(
            passed=bool(passed),
            description=f"top-1 agreement {metrics['top1_agreement']:.4f} on {metrics['compared_rows']} held-out rows, greedy answers equal {metrics['greedy_agreement']:.3f}, mean KL {metrics['kl_mean']:.2g} nats",
            metadata={name: metrics[name] for name in ("top1_agreement", "greedy_agreement", "kl_mean")},
        )

    @dg.asset_check(
        asset=merged_model,
        blocking=True,
        partitions_def=base_models,
        description="The merged file itself, answering from disk, beats the base on the held-out rows.",
    )
    def file_is_better_than_base(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Fail if rounding to bf16 cost the gain (only an override merges such a file at all)."""
        name = context.partition_key
        metrics, metric = workshop.store.need("merged_model", name).metrics, workshop.project.recipe(name).evaluation.metric
        gain = {"mean": metrics["merged_gain"], "low": metrics["merged_gain_low"], "high": metrics["merged_gain_high"]}
        return dg.AssetCheckResult(
            passed=bool(metrics["merged_beats_base"]),
            severity=ERROR if workshop.project.gate.override is None else WARN,
            description=f"{metric} {metrics[f'merged_{metric}']:.3f}, {gain['mean']:+.3f} against base [{gain['low']:+.3f}, {gain['high']:+.3f}], stop rate {metrics['merged_stop_rate']:.2f}",
            metadata=_numbers(gain),
        )

    @dg.asset(deps=[eval_report, merged_model], group_name="release", owners=OWNERS, kinds={"table"}, code_version="1")
    def leaderboard(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """One table over all base models on the same held-out rows; a base model without a report is shown as such."""
        reports = {name: workshop.store.current("eval_report", name) for name in workshop.project.base_models}
        lines = _table(workshop, reports)

        def make(output: Path) -> StepResult:
            (output / "leaderboard.md").write_text("\n".join(lines) + "\n")
            return StepResult({"base_models": len(reports), "judged": sum(report is not None for report in reports.values())})

        with user_errors():
            known = {f"eval_report[{name}]": (report, None) for name, report in reports.items() if report}
            artifact, reused = workshop.materialize(
                context, settings={"base_models": sorted(reports), "table": lines}, inputs=known, make=make
            )
        return result(artifact, reused, leaderboard=dg.MetadataValue.md((artifact.path / "leaderboard.md").read_text()))

    assets = [eval_report, merged_model, leaderboard]
    checks = [better_than_base, better_than_prompting, nothing_forgotten, dpo_does_not_hurt, merge_is_equivalent, file_is_better_than_base]
    return assets, checks


def _table(workshop: Workshop, reports: dict[str, Artifact | None]) -> list[str]:
    lines = [
        "| base model | verdict | merged | base | few-shot | SFT | DPO | general loss | held-out rows | trained in s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for name, artifact in reports.items():
        if artifact is None:
            rows.append((-1.0, f"| {name} | not judged | – | – | – | – | – | – | – | – |"))
            continue
        report = json.loads((artifact.path / "report.json").read_text())
        verdict, metric = decide(report, workshop.project.gate), report["metric"]
        cells = [
            f"{report['scores'][candidate][metric]:.3f}" if candidate in report["scores"] else "–"
            for candidate in ("base", "few_shot", "sft", "dpo")
        ]
        best = verdict["speaker"]
        seconds = sum(
            (
                trained.metrics.get("seconds", 0.0)
                for asset in ("lora_adapter", "dpo_adapter")
                if (trained := workshop.store.current(asset, name))
            ),
            0.0,
        )
        loss = f"{-report['retention']['comparisons'][best]['base']['loss']['mean']:+.3f}" if report["retention"] else "–"
        rows.append(
            (
                report["scores"][best][metric],
                f"| {name} | {verdict['status']} | {verdict['candidate'] or '–'} | {' | '.join(cells)} | {loss} | {report['heldout_rows']} | {seconds:.0f} |",
            )
        )
    return lines + [line for _, line in sorted(rows, key=lambda row: -row[0])]
