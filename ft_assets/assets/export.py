"""The asset `export`: the champion in the forms that serve it, each asked what the merged model was asked."""

import json
from typing import Any

import dagster as dg

from ft_assets.errors import ReleaseError
from ft_assets.export.tools import identities
from ft_assets.models.license import snapshot_license
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import ERROR, WARN, Materializer, result
from ft_assets.release.lookup import adapter_of, by_content, need_champion
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
    """Serving forms of the champion: GGUF with an Ollama Modelfile, NF4, the adapter alone; each answers as it should."""
    name, project, store = context.partition_key, materializer.project, materializer.store
    where = f"export[{name}]"
    released, champion = need_champion(store, name, where)
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
        libraries="infer",
        space=size * max(1, len(project.release.forms or [1])) + 100_000_000,
    )
    return result(
        artifact,
        reused,
        forms_and_how_to_serve_them=dg.MetadataValue.md((artifact.path / "README.md").read_text()),
    )


@check(
    export,
    blocking=True,
    description="Each exported form answers held-out prompts as the merged model does.",
)
def forms_answer_alike(checked: Checked) -> dg.AssetCheckResult:
    """Fail below release.min_form_agreement, if template, stop tokens or tokens were lost, or if nothing could read a form; warn
    of a form that was refused and of a reader that failed."""
    document = json.loads((checked.artifact.path / "export.json").read_text())
    return verdict_on_forms(document, checked.project.release.min_form_agreement)


FOUR_BITS = ("gguf-q4_k_m", "nf4")  # what they cost a small model is real, and no fault of the file


def least_agreement(form: str, wanted: float | None) -> float:
    """Return the share of tokens below which a form is taken for broken: `wanted` if it is set, else by the form's bits."""
    return wanted if wanted is not None else 0.5 if form in FOUR_BITS else 0.9


def verdict_on_forms(document: dict[str, Any], wanted: float | None) -> dg.AssetCheckResult:
    """Return the check's result for an export.json; `wanted`: release.min_form_agreement."""
    made = [entry for entry in document["forms"] if not entry["refused"]]
    refused = [
        f"{entry['form']} refused: {entry['refused']}"
        for entry in document["forms"]
        if entry["refused"]
    ]
    unread = [
        f"{entry['form']} not read by {reader}: {reason}"
        for entry in made
        for reader, reason in entry["failed"].items()
    ]
    bad = [
        f"{entry['form']} by {reader}: {share['top1']:.3f} of {document['tokens']} tokens are the merged model's, at least {least_agreement(entry['form'], wanted)}"
        for entry in made
        for reader, share in entry["agreement"].items()
        if share["top1"] < least_agreement(entry["form"], wanted)
    ]
    bad += [
        f"{entry['form']}: {name} not carried over"
        for entry in made
        for name, good in entry["carried_over"].items()
        if not good
    ]
    bad += [f"{entry['form']}: nothing could read it" for entry in made if not entry["agreement"]]
    good = [
        f"{entry['form']} by {reader}: top-1 {share['top1']:.3f}, greedy answers equal {share['greedy']:.2f}"
        for entry in made
        for reader, share in entry["agreement"].items()
    ]
    nothing = [f"nothing exported: {document['skipped']}"] if document["skipped"] else []
    return dg.AssetCheckResult(
        passed=not bad and not refused and not unread,
        severity=ERROR if bad else WARN,
        description="; ".join([*bad, *unread] if bad else [*refused, *unread, *good, *nothing])
        or "no forms asked for",
    )
