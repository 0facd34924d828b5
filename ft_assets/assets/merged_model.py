"""The asset `merged_model`: the base with the proven adapter merged in, and its checks."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path

import dagster as dg
from pydantic import JsonValue

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.artifacts.manifest import FileEntry
from ft_assets.assets.eval_report import numbers
from ft_assets.assets.judged import TRAINED, judged, optional_stages
from ft_assets.assets.raw_text import text_stage
from ft_assets.config import ADAPTERS, GateSettings
from ft_assets.evaluation.report_model import Estimate
from ft_assets.evaluation.setting_files import read_schema
from ft_assets.evaluation.verdict.gate import require_pass
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.links import report_path
from ft_assets.orchestration.materializer import ERROR, WARN, Materializer, result, tag_run
from ft_assets.release.card_facts import CardFacts, adapter_method, card_body, card_facts
from ft_assets.release.provenance import Build, write_provenance
from ft_assets.release.signing import Signing
from ft_assets.steps import merge

# The part of the gate that every merged file must pass.
OF_THE_FILE = {
    "min_top1_agreement",
    "better",
    "confidence",
    "min_stop_rate",
    "metrics",
    "min_graded_rows",
}


def _summary(metrics: Metrics) -> str:
    return f"top-1 agreement {metrics['top1_agreement']:.4f}"


@asset(
    deps=[*TRAINED, "eval_report"],
    also=lambda project: [
        *optional_stages(project),
        *text_stage("text_dataset", "raw_text")(project),
    ],
    group="release",
    kinds=["huggingface"],
    code_version="10",
    gpu=True,
    summary=_summary,
)
def merged_model(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The bf16 model to serve: base + proven adapter, compared with them from disk.

    It exists only behind a PASS.
    """
    name, project, store = context.partition_key, materializer.project, materializer.store
    used, versions = judged(materializer, "merged_model", name)
    report = store.current("eval_report", name)
    verdict = require_pass(report, versions, project.gate, f"merged_model[{name}]", store.verified)
    assert report is not None
    adapter = used[ADAPTERS[verdict.merged_candidate]]
    size = used["base_model"].manifest.bytes
    method = adapter_method(adapter)
    # After QLoRA one of the two merges is a model that the report did not judge. It must pass the
    # whole gate.
    part = OF_THE_FILE | ({"prompting"} if project.gate.must_beat - {"few_shot"} else set())
    gate = project.gate.model_dump(
        mode="json", include=None if method == "qlora" else part, exclude={"override"}
    )
    evaluation = project.recipe(name).evaluation
    identity: JsonValue = {
        "candidate": verdict.candidate,
        "override": verdict.override,
        "method": method,
        "gate": gate,
    }
    signing = Signing.of(project, None, f"merged_model[{name}]")
    key = signing.key
    started, run, lineage = time.time(), context.run_id, _lineage(store, name, used)

    @functools.cache  # read only if the model is made
    def card() -> CardFacts:
        facts = card_facts(project, store, name, used, versions)
        return facts.model_copy(update={"signed_with": key.fingerprint if key else None})

    def attest(output: Path, files: Mapping[str, FileEntry]) -> dict[str, str]:
        """Write the provenance of the merged model when it is made. It has no metrics."""
        write_provenance(output, files, Build(run, started, identity, card(), lineage), key)
        return {}

    artifact, reused = materializer.materialize(
        context,
        identity=identity,
        inputs={
            "base_model": (used["base_model"], None),
            "adapter": (adapter, None),
            "eval_report": (report, None),
            **{
                f"heldout_split#{part}": (used["heldout_split"], part)
                for part in ("heldout", "retention")
            },
        },
        step=lambda: merge.Settings(
            method=method,
            gate=GateSettings.model_validate(gate),
            evaluation=evaluation,
            answer_schema=read_schema(project, evaluation),
            verdict=signing.proven(verdict, report, f"merged_model[{name}]"),
            card=card(),
            root=project.root,
        ),
        libraries="infer",
        finish=attest,
        # After QLoRA both merges are on disk for a while.
        space=size * (2 if method == "qlora" else 1) + 100_000_000,
    )
    tag_run(context, version=artifact.fingerprint)
    text = card_body((artifact.path / "README.md").read_text())
    first = ("verdict", "merged_gain", "top1_agreement")
    return result(
        artifact,
        reused,
        first,
        report=dg.MetadataValue.url(report_path(name, report.fingerprint)),
        model_card=dg.MetadataValue.md(text),
    )


def _lineage(store: ArtifactStore, name: str, used: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Return all artifacts above a merged model, by asset."""
    shared = ("raw_dataset", "raw_preferences")
    found = {asset: store.current(asset, None) for asset in shared}
    found |= {asset: store.current(asset, name) for asset in ("recipe", "answers", "eval_report")}
    if "text_adapter" in used:
        found |= {"raw_text": store.current("raw_text", None)}
        found |= {"text_dataset": store.current("text_dataset", name)}
    return {**{asset: one for asset, one in found.items() if one is not None}, **used}


@check(
    merged_model,
    blocking=True,
    description="The merged model, read from disk, answers as base + adapter do.",
    fix="do not serve this file; look at its metadata, and report a fault if the base "
    "is a usual one",
)
def merge_is_equivalent(checked: Checked) -> dg.AssetCheckResult:
    """Fail if the agreement is proven to be below the gate's, or if tokenizer or template differ.

    Of an artifact of an older version, which has no interval, the agreement itself is compared.
    """
    metrics, least = checked.metrics, checked.project.gate.min_top1_agreement
    whole = (
        metrics["modules_proven"] == metrics["adapter_modules"]
        and metrics["same_tokenizer_and_template"]
    )
    onto = {
        "original": "the original weights",
        "dequantized": "the weights NF4 makes of the base",
    }.get(metrics.get("merge_base", ""))
    metric = checked.project.recipe(checked.name).evaluation.metric
    both = {
        name: metrics.get(f"merged_onto_{name}_{metric}") for name in ("original", "dequantized")
    }
    chosen = (
        f"; merged onto {onto}: {metric} {both['original']:.3f} onto the original, "
        f"{both['dequantized']:.3f} onto NF4's"
        if None not in both.values()
        else ""
    )
    broken = {name: metrics.get(f"merged_onto_{name}_breaks_the_gate") for name in both}
    chosen += "".join(f"; {name} breaks the gate: {why}" for name, why in broken.items() if why)
    return dg.AssetCheckResult(
        passed=bool(metrics.get("top1_high", metrics["top1_agreement"]) >= least and whole),
        description=f"{metrics['modules_proven']} of {metrics['adapter_modules']} modules proven, "
        f"{_agreement(metrics, least)}, greedy answers equal {metrics['greedy_agreement']:.3f}, "
        f"mean KL {metrics['kl_mean']:.2g} nats{chosen}",
        metadata={
            name: metrics[name]
            for name in (
                "top1_agreement",
                "top1_ties",
                "greedy_agreement",
                "kl_mean",
                "logit_difference_max",
            )
        },
    )


def _agreement(metrics: Metrics, least: float) -> str:
    """Return the agreement as text, with what the compared tokens show."""
    rows = f"{metrics['compared_rows']} held-out rows"
    if general := metrics.get("compared_general_rows"):
        rows += f" and {general} general prompts"
    text = (
        f"top-1 agreement {metrics['top1_agreement']:.4f} on {rows} "
        f"({metrics['top1_ties']} of {metrics['compared_tokens']} tokens are ties)"
    )
    if (low := metrics.get("top1_low")) is None or low >= least:
        return text
    interval = f"[{low:.4f}, {metrics['top1_high']:.4f}]"
    return f"{text}; the tokens do not show {least} {interval}, so the file's own score decides"


@check(
    merged_model,
    blocking=True,
    description="The parts that see or hear are the base's, byte for byte.",
)
def other_parts_untouched(checked: Checked) -> dg.AssetCheckResult:
    """Fail if a tensor outside the text part differs from the base's, by its hash."""
    tensors = checked.metrics.get("other_tensors", 0)
    changed = checked.metrics.get("other_tensors_changed", "")
    text = (
        f"{tensors} tensors outside the text part are the base's"
        if tensors
        else ("the base has no other parts than its text")
    )
    return dg.AssetCheckResult(
        passed=not changed,
        description=f"differ from the base's: {changed}" if changed else text,
    )


@check(
    merged_model,
    blocking=True,
    description="The merged file itself, read from disk, beats the base on the held-out rows.",
    fix="rounding to bf16 cost the gain: train longer or with a higher learning rate, "
    "then judge again",
)
def file_is_better_than_base(checked: Checked) -> dg.AssetCheckResult:
    """Fail if rounding to bf16 cost the gain. Only an override merges such a file."""
    metrics, metric = checked.metrics, checked.project.recipe(checked.name).evaluation.metric
    gain = Estimate(
        mean=metrics["merged_gain"],
        low=metrics["merged_gain_low"],
        high=metrics["merged_gain_high"],
    )
    return dg.AssetCheckResult(
        passed=bool(metrics["merged_beats_base"]),
        severity=ERROR if checked.project.gate.override is None else WARN,
        description=f"{metric} {metrics[f'merged_{metric}']:.3f}, {gain.mean:+.3f} against base "
        f"[{gain.low:+.3f}, {gain.high:+.3f}], stop rate {metrics['merged_stop_rate']:.2f}",
        metadata=numbers(gain),
    )
