"""The asset `export`: the champion in its serving formats, each compared with the merged model."""

from functools import partial

import dagster as dg

from ft_assets.errors import ReleaseError
from ft_assets.export.export_report import ExportedFormat, ExportReport
from ft_assets.export.tools import identities
from ft_assets.models.license import snapshot_license
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import ERROR, WARN, Materializer, result
from ft_assets.release.keys import signing_key
from ft_assets.release.lookup import adapter_of, by_content
from ft_assets.release.signing import proven_release
from ft_assets.release.statements import MODEL_SIGNATURE, sign_files
from ft_assets.steps import export as export_step


def _summary(metrics: Metrics) -> str:
    return f"forms: {metrics['forms']}"


@asset(
    deps=["release", "heldout_split", "base_model"],
    group="release",
    kinds=["gguf"],
    code_version="2",
    gpu=True,
    summary=_summary,
)
def export(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """Serving formats of the champion: GGUF with an Ollama Modelfile, NF4, the adapter alone."""
    name, project, store = context.partition_key, materializer.project, materializer.store
    where = f"export[{name}]"
    proven = proven_release(project, store, name, where, weights=False)
    released, champion = proven.released, proven.champion
    key = signing_key(project)
    base = by_content(store, "base_model", name, champion.manifest.inputs["base_model"])
    if base is None:
        raise ReleaseError(
            where=where,
            found="the champion's base is not in the store any more",
            expected="its base_model",
            fix="restore it from a backup",
        )
    adapter, split = adapter_of(store, name, champion), store.need("heldout_split", name)
    # Of the champion's own base: today's base may be a different one.
    origin = base.manifest.settings.get("identity", {})
    source = {"base": origin.get("hub"), "revision": origin.get("commit")}
    llama_cpp = project.path(project.release.llama_cpp) if project.release.llama_cpp else None
    identity = {
        "forms": project.release.forms,
        "smoke_rows": project.release.smoke_rows,
        "max_new_tokens": project.recipe(name).evaluation.max_new_tokens,
        **({"source": source} if "adapter" in (project.release.forms or []) else {}),
        **({"signed_with": key.fingerprint} if key else {}),
        "tools": identities(project.release.forms or ["gguf-q8_0"], llama_cpp),
    }
    size = champion.manifest.bytes
    artifact, reused = materializer.materialize(
        context,
        identity=identity,
        inputs={
            "release#champion": (released, "champion"),
            "champion": (champion, None),
            "base_model": (base, None),
            "heldout_split#heldout": (split, "heldout"),
            **({"champion_adapter": (adapter, None)} if adapter else {}),
        },
        step=export_step.Settings(
            forms=project.release.forms,
            smoke_rows=project.release.smoke_rows,
            max_new_tokens=project.recipe(name).evaluation.max_new_tokens,
            name=name,
            license=snapshot_license(base.path).identifier,
            llama_cpp=str(llama_cpp) if llama_cpp else None,
            base=source["base"] or str(base.path),
            revision=source["revision"],
        ),
        finish=partial(sign_files, name, key, MODEL_SIGNATURE),
        libraries="infer",
        space=size * max(1, len(project.release.forms or [1])) + 100_000_000,
    )
    return result(
        artifact,
        reused,
        first=("forms", "refused", "not_read"),
        forms_and_how_to_serve_them=dg.MetadataValue.md((artifact.path / "README.md").read_text()),
    )


@check(
    export,
    blocking=True,
    description="Each exported format answers held-out prompts as the merged model does.",
    fix="do not serve a format that is named; remove it from release.forms, or use "
    "another converter",
)
def forms_answer_alike(checked: Checked) -> dg.AssetCheckResult:
    """Fail below release.min_form_agreement, if a part was lost, or if no reader read a format.

    Warn about a format that was refused, and about a reader that failed.
    """
    report = ExportReport.read(checked.artifact.path)
    return verdict_on_formats(report, checked.project.release.min_form_agreement)


# The loss of agreement in 4 bits is real for a small model; the file is not broken.
FOUR_BITS = ("gguf-q4_k_m", "nf4")


def least_agreement(name: str, wanted: float | None) -> float:
    """Return the share of tokens below which a format is broken: `wanted`, else by its bits."""
    if wanted is not None:
        return wanted
    return 0.5 if name in FOUR_BITS else 0.9


def verdict_on_formats(report: ExportReport, wanted: float | None) -> dg.AssetCheckResult:
    """Judge an export; `wanted` is release.min_form_agreement."""
    refused = [
        f"{entry.format} refused: {entry.refused}" for entry in report.formats if entry.refused
    ]
    unread = [
        f"{entry.format} not read by {reader}: {reason}"
        for entry in report.written
        for reader, reason in entry.failed.items()
    ]
    bad = [problem for entry in report.written for problem in _problems(entry, report, wanted)]
    good = [
        f"{entry.format} by {reader}: top-1 {share.top1:.3f}, "
        f"greedy answers equal {share.greedy:.2f}"
        for entry in report.written
        for reader, share in entry.agreement.items()
    ]
    nothing = [f"nothing exported: {report.skipped}"] if report.skipped else []
    lines = [*bad, *unread] if bad else [*refused, *unread, *good, *nothing]
    return dg.AssetCheckResult(
        passed=not bad and not refused and not unread,
        severity=ERROR if bad else WARN,
        description="; ".join(lines) or "release.forms is empty",
    )


def _problems(entry: ExportedFormat, report: ExportReport, wanted: float | None) -> list[str]:
    """List the reasons why a written format is broken."""
    least = least_agreement(entry.format, wanted)
    problems = [
        f"{entry.format} by {reader}: {share.top1:.3f} of {report.tokens} tokens are the merged "
        f"model's, at least {least}"
        for reader, share in entry.agreement.items()
        if share.top1 < least
    ]
    problems += [
        f"{entry.format}: {name} not carried over"
        for name, good in entry.carried_over.items()
        if not good
    ]
    if not entry.agreement:
        problems.append(f"{entry.format}: no reader could read it")
    return problems
