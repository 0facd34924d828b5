"""The asset `eval_report`: the evaluation of base, SFT and DPO, and its checks."""

import json
from functools import partial
from typing import Any

import dagster as dg

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.assets.dpo_adapter import has_preferences
from ft_assets.assets.judged import (
    TRAINED,
    answers_of_today,
    asks_people,
    evaluation_identity,
    has_judge,
    has_rivals,
    judged,
    optional_stages,
    people_of_today,
    rivals_of_today,
)
from ft_assets.assets.own_rehearsal import has_own_rehearsal
from ft_assets.assets.rl_adapter import reinforces, rewards_of
from ft_assets.compat.dagster import TO_DO
from ft_assets.config import ADAPTERS, GateSettings
from ft_assets.errors import ArtifactError
from ft_assets.evaluation.report_model import Estimate, EvalReport, Finding
from ft_assets.evaluation.verdict.decision import (
    PASS,
    beats,
    calibration,
    decide,
    forgetting,
    later_hurts,
)
from ft_assets.evaluation.verdict.uses import Uses
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.links import report_path
from ft_assets.orchestration.materializer import (
    ERROR,
    WARN,
    Inputs,
    Materializer,
    result,
    tag_run,
)
from ft_assets.release.keys import signing_key
from ft_assets.release.signing import REPORT_SIGNATURE
from ft_assets.release.statements import sign_files
from ft_assets.steps import evaluate


def _report(checked: Checked) -> EvalReport:
    return EvalReport.read(checked.artifact.path / "report.json")


def numbers(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as check metadata, which the UI plots over runs."""
    return {
        "difference": estimate.mean,
        "interval_low": estimate.low,
        "interval_high": estimate.high,
    }


def earlier_verdicts(store: ArtifactStore, name: str) -> Uses:
    """Return the verdicts on a base model that the store knows, oldest first."""
    reports, _ = store.versions("eval_report", name)
    histories = [_history(store, report) for report in reports]
    return Uses.joined(sorted(histories, key=lambda one: len(one.looks)))


def _history(store: ArtifactStore, report: Artifact) -> Uses:
    """Return the verdicts up to a report. A damaged one counts as a verdict on all rows."""
    try:
        return Uses.of_report(store.verified(report))
    except ArtifactError:
        return Uses.unreadable(report)


def _summary(metrics: Metrics) -> str:
    gain = metrics.get("gain_vs_base")
    against = f", {gain:+.3f} against base" if gain is not None else ""
    return f"{metrics['verdict']}{against}, {metrics['heldout_rows']} held-out rows"


@asset(
    deps=[*TRAINED, "raw_dataset", "answers"],
    also=lambda project: [
        *(["human_review"] if asks_people(project) else []),
        *(["rival_answers"] if has_rivals(project) else []),
        *(["advice"] if project.advise else []),
        *optional_stages(project),
    ],
    group="evaluation",
    kinds=["report"],
    code_version="6",
    summary=_summary,
)
def eval_report(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The scores of base, prompted base, SFT and DPO, paired by row, and the verdict.

    It loads no model: a changed metric scores the kept answers again. General prompts measure
    forgetting.
    """
    name, project, store = context.partition_key, materializer.project, materializer.store
    used, versions = judged(materializer, "eval_report", name)
    previous = store.current("eval_report", name)
    decisive = evaluation_identity(materializer, name)
    gate = project.gate.model_dump(mode="json", exclude={"override", "min_top1_agreement"})
    has_dpo = has_preferences(used["dpo_adapter"].metrics)
    answers = answers_of_today(materializer, name, used)
    people: Inputs = {}
    if asks_people(project):
        people = {"human_review": (people_of_today(materializer, name), None)}
    rivals: Inputs = {}
    if project.recipe(name).evaluation.rivals:
        rivals = {
            "rival_answers": (rivals_of_today(materializer, name, used["heldout_split"]), None)
        }
    bar = project.review.min_judge_agreement if project.review and people else None
    artifact, reused = materializer.materialize(
        context,
        identity={
            **decisive,
            "gate": gate,
            "has_dpo": has_dpo,
            **({} if bar is None else {"min_judge_agreement": bar}),
            **({"rivals": "2"} if rivals else {}),  # a code version: the rows of rivals are kept
        },
        inputs={
            "answers": (answers, None),
            **people,
            **rivals,
            **({"advice": (store.need("advice", name), None)} if project.advise else {}),
            **{asset: (used[asset], None) for asset in ADAPTERS.values() if asset in used},
            **{
                f"heldout_split#{part}": (used["heldout_split"], part)
                for part in ("train", "heldout", "retention")
            },
        },
        step=lambda: evaluate.Settings(
            evaluation=project.recipe(name).evaluation,
            gate=GateSettings.model_validate(gate),
            answer_schema=decisive["schema"],
            has_dpo=has_dpo,
            bound_to=versions,
            raw_dataset=store.verified(store.need("raw_dataset", None)).path,
            root=project.root,
            previous=previous.path if previous else None,
            uses=earlier_verdicts(store, name),
            min_judge_agreement=bar or 0.0,
            rewards=rewards_of(project.recipe(name)) or None,
            own_rehearsal_rows=used["heldout_split"].metrics["rehearsal_rows"]
            if has_own_rehearsal(project)
            else None,
        ),
        libraries="score",
        finish=partial(sign_files, f"eval_report[{name}]", signing_key(project), REPORT_SIGNATURE),
    )
    picture = (artifact.path / "info" / "scores.txt").read_text()
    text, since = ((artifact.path / name).read_text() for name in ("report.md", "info/changes.md"))
    return result(
        artifact,
        reused,
        first=("verdict", "reason", "gain_vs_base", "diagnosis"),
        report=dg.MetadataValue.md(f"![scores]({picture})\n\n{text}"),
        since_the_previous_report=dg.MetadataValue.md(since),
        page=dg.MetadataValue.url(report_path(name, artifact.fingerprint)),
        every_row=dg.MetadataValue.path(str(artifact.path / "rows.parquet")),
    )


@check(
    eval_report,
    blocking=True,
    description="The verdict is PASS: held-out quality is proven to be above the base's.",
    fix="read the report (ft report {base}); nothing is merged or released until a verdict is PASS",
)
def better_than_base(checked: Checked) -> dg.AssetCheckResult:
    """Fail on FAIL and on INCONCLUSIVE."""
    report = _report(checked)
    verdict = decide(report, checked.project.gate)
    tag_run(checked.context, verdict=verdict.status)
    blocking = ERROR if checked.project.gate.override is None else WARN
    return dg.AssetCheckResult(
        passed=verdict.status == PASS,
        severity=blocking,
        description=f"{verdict.status}: {'; '.join(verdict.reasons)}",
        metadata=numbers(report.comparisons[verdict.reported_candidate]["base"][report.metric])
        | {"report": dg.MetadataValue.url(report_path(checked.name, checked.artifact.fingerprint))}
        | _advice(checked),
    )


def _advice(checked: Checked) -> dict[str, str]:
    """Return the next step after a verdict that is not a PASS, by the report's first finding."""
    file = checked.artifact.path / "diagnosis.json"
    findings = json.loads(file.read_text()) if file.exists() else []
    if not findings:
        return {}
    first = Finding.model_validate(findings[0])
    read = f"read the report (ft report --base {checked.name})"
    return {TO_DO: f"{first.advice} ({first.cause} is suspected: {first.evidence[0]}); {read}"}


@check(
    eval_report,
    description="The fine-tune beats the base with a few-shot prompt. Else prompting is enough.",
)
def better_than_prompting(checked: Checked) -> dg.AssetCheckResult:
    """Warn if a prompted base is as good. Fail if a PASS must be better (gate.prompting)."""
    report, gate = _report(checked), checked.project.gate
    reported, metric = decide(report, gate).reported_candidate, report.metric
    severity = ERROR if "few_shot" in gate.must_beat and gate.override is None else WARN
    if "few_shot" not in report.scores:
        return dg.AssetCheckResult(
            passed=False,
            severity=severity,
            description="not compared: data.few_shot names no examples; `auto` chooses them",
        )
    entry = report.comparisons[reported]["few_shot"][metric]
    passed = beats(entry, gate.confidence)
    text = f"{reported}: {entry.describe(metric, 'the few-shot prompt')}"
    return dg.AssetCheckResult(
        passed=passed,
        severity=severity,
        description=text
        if passed
        else f"you do not need this fine-tune, or cannot show that you do: {text}",
        metadata=numbers(entry),
    )


@check(
    eval_report,
    description="The rented hosts cost at most launcher.max_cost for all steps up to this report.",
    only_if=lambda project: project.launcher.cost_cap() is not None,
)
def within_budget(checked: Checked) -> dg.AssetCheckResult:
    """Warn if the steps cost more than the cap together. What was made elsewhere cost nothing."""
    costs = host_costs(checked.materializer.store, checked.artifact)
    cap, cost = checked.project.launcher.cost_cap(), sum(costs.values())
    return dg.AssetCheckResult(
        passed=cap is None or cost <= cap,
        severity=WARN,
        description=f"cost {cost:.2f} of at most {cap:.2f}",
        metadata={f"cost/{asset}": paid for asset, paid in costs.items()},
    )


def host_costs(store: ArtifactStore, artifact: Artifact) -> dict[str, float]:
    """Return {asset: its cost} of an artifact and of all the versions that it was made from."""
    costs, seen, pending = dict[str, float](), set[str](), [artifact]
    while pending:
        one = pending.pop()
        if one.fingerprint in seen:
            continue
        seen.add(one.fingerprint)
        if paid := one.metrics.get("host_cost"):
            costs[one.asset] = costs.get(one.asset, 0.0) + float(paid)
        for name, read in one.manifest.inputs_read.items():
            asset = name.partition("#")[0].partition("[")[0]
            for partition in {artifact.manifest.partition, None}:
                found = store.find(asset, partition, read.fingerprint)
                pending += [found] if found is not None else []
    return costs


@check(
    eval_report,
    description="The fine-tune beats each rival of evaluation.rivals.",
    only_if=has_rivals,
)
def better_than_rivals(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the rivals that are as good.

    One with `must_beat`, or in gate.prompting, also decides the verdict.
    """
    report, gate = _report(checked), checked.project.gate
    reported, rivals = decide(report, gate).reported_candidate, report.rivals or {}
    entries = {name: rival.comparisons[reported] for name, rival in rivals.items()}
    texts = [
        f"{entry.describe(report.metric, name)} ({rivals[name].cost.describe()})"
        for name, entry in entries.items()
    ]
    return dg.AssetCheckResult(
        passed=all(beats(entry, report.confidence) for entry in entries.values()),
        severity=WARN,
        description=f"{reported}: {'; '.join(texts)}" if texts else "this base model has no rivals",
    )


@check(
    eval_report,
    blocking=True,
    description="The model to merge did not get worse on general prompts.",
    fix="add general rows to data.rehearsal, or train less; gate.max_retention_loss "
    "and gate.max_retention_drop set the tolerance",
)
def nothing_forgotten(checked: Checked) -> dg.AssetCheckResult:
    """Fail if loss or task score on the retention set fell by more than the gate's tolerance.

    Fail also if the rows cannot show whether they did.
    """
    report, gate = _report(checked), checked.project.gate
    reported = decide(report, gate).reported_candidate
    found = forgetting(reported, report, gate)
    if not found.decisive:
        return dg.AssetCheckResult(
            passed=False,
            severity=WARN,
            description="not measured: data.retention names no prompts",
        )
    return dg.AssetCheckResult(
        passed=found.passed,
        severity=ERROR if gate.override is None else WARN,
        description=f"{reported}: {'; '.join(found.decisive)}",
        metadata=numbers(report.retention.comparisons[reported]["base"]["loss"])
        if report.retention
        else {},
    )


@check(
    eval_report,
    description="DPO is not worse than SFT. Else SFT is merged.",
)
def dpo_does_not_hurt(checked: Checked) -> dg.AssetCheckResult:
    """Warn if DPO is lower than SFT on held-out or on general prompts."""
    report = _report(checked)
    if "dpo" not in report.scores:
        return dg.AssetCheckResult(passed=True, description="no preference pairs: no DPO")
    return _not_worse_than_sft("dpo", checked, report)


def _not_worse_than_sft(
    candidate: str, checked: Checked, report: EvalReport
) -> dg.AssetCheckResult:
    entry = report.comparisons[candidate]["sft"][report.metric]
    hurts = later_hurts(candidate, report, checked.project.gate)
    return dg.AssetCheckResult(
        passed=hurts is None,
        severity=WARN,
        description=hurts or f"{candidate}: {entry.describe(report.metric, 'SFT')}",
        metadata=numbers(entry),
    )


@check(
    eval_report,
    description="RL is not worse than SFT. Else another candidate is merged.",
    only_if=reinforces,
)
def rl_does_not_hurt(checked: Checked) -> dg.AssetCheckResult:
    """Warn if RL is lower than SFT on held-out or on general prompts."""
    return _not_worse_than_sft("rl", checked, _report(checked))


@check(
    eval_report,
    blocking=True,
    description="The LLM judge, where a PASS needs its scores, agrees with people.",
    only_if=has_judge,
    fix="let people judge more answers (ft review {base}), or take another judge or metric",
)
def judge_agrees_with_people(checked: Checked) -> dg.AssetCheckResult:
    """Fail if alpha is below review.min_judge_agreement, or not proven to be above chance.

    Only warn if no person judged, or if a PASS does not need the judge.
    """
    report, gate = _report(checked), checked.project.gate
    found = report.calibration
    needed = not calibration(report, gate).passed and gate.override is None
    return dg.AssetCheckResult(
        passed=found is not None and found.agrees,
        severity=ERROR if needed else WARN,
        description=found.describe()
        if found
        else "not calibrated: no person judged these answers; add `review: {}` and open ft review",
        metadata={"alpha": found.with_people.alpha} if found and found.with_people else {},
    )
