"""Assets that release: merged_model and its checks, leaderboard."""

import json
from pathlib import Path

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.data import OWNERS
from ft_assets.assets.evaluation import TRAINED, judged, numbers
from ft_assets.assets.workshop import ERROR, GPU_POOL, WARN, Workshop, library_versions, result, user_errors
from ft_assets.evaluation.gate import require_pass
from ft_assets.evaluation.sources import read_schema
from ft_assets.evaluation.verdict import decide
from ft_assets.job import StepResult


def release_assets(base_models: dg.PartitionsDefinition) -> tuple[list[dg.AssetsDefinition], list[dg.AssetChecksDefinition]]:
    """Return the assets and checks; all but the leaderboard are partitioned by base model."""
    eval_report = dg.AssetKey("eval_report")

    @dg.asset(
        partitions_def=base_models,
        deps=[*TRAINED, eval_report],
        group_name="release",
        owners=OWNERS,
        kinds={"huggingface"},
        code_version="4",
        pool=GPU_POOL,
    )
    def merged_model(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """The bf16 model to serve: base + proven adapter, compared with them from disk. Exists only behind a PASS."""
        name, project, store = context.partition_key, workshop.project, workshop.store
        with user_errors():
            used, versions = judged(workshop, "merged_model", name)
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
            metadata=numbers(gain),
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

    return [merged_model, leaderboard], [merge_is_equivalent, file_is_better_than_base]


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
