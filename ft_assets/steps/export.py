"""Step: write the champion's serving forms, and measure how far each agrees with the merged model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ft_assets.artifacts import Artifact, verify_files
from ft_assets.data.tables import read_table
from ft_assets.errors import FtError
from ft_assets.hardware import free_unused
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.export.readers import Expected, Found


class Settings(StepSettings):
    """`forms`: None for the default form, if the champion can have it. `name`: the partition.

    `base` and `revision` name the base for the reader of an adapter: the hub id and commit, or a
    folder and None.
    """

    STEP: ClassVar = Step("export", gpu=True)

    forms: Sequence[str] | None
    smoke_rows: int
    max_new_tokens: int
    name: str
    license: str | None
    llama_cpp: str | None
    base: str
    revision: str | None


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    from ft_assets.export import readers
    from ft_assets.export.gguf import why_not

    merged, base, adapter = (
        job.inputs["champion"],
        job.inputs["base_model"],
        job.inputs.get("champion_adapter"),
    )
    verify_files(Artifact.read(merged))
    forms, most = settings.forms, settings.max_new_tokens
    skipped = None
    if forms is None:
        skipped = None if settings.llama_cpp else why_not(merged)
        forms = [] if skipped else ["gguf-q8_0"]
    rows = sorted(
        read_table(job.inputs["heldout_split"] / "heldout.parquet"), key=lambda row: row["id"]
    )[: settings.smoke_rows]
    asked = [row["messages"][:-1] for row in rows]
    expected, dtype = readers.by_merged(merged, asked, most) if forms else ([], None)
    free_unused()
    entries = [
        _one(form, merged, base, adapter, job, settings, asked, expected, report) for form in forms
    ]
    tokens = sum(len(one.ids) for one in expected)
    document = {
        "asked": len(asked),
        "tokens": tokens,
        "logits_in": dtype,
        "forms": entries,
        "skipped": skipped,
    }
    (job.output / "export.json").write_text(json.dumps(document, indent=1, ensure_ascii=False))
    (job.output / "README.md").write_text(page(document), encoding="utf-8")
    made = [entry for entry in entries if entry["refused"] is None]
    shares = {
        f"{entry['form']}_{kind}": min(shares[kind] for shares in entry["agreement"].values())
        for entry in made
        for kind in ("top1", "greedy")
        if entry["agreement"]
    }
    failed = [
        f"{entry['form']} by {reader}: {reason}"
        for entry in made
        for reader, reason in entry["failed"].items()
    ]
    return StepResult(
        {
            "forms": ", ".join(entry["form"] for entry in made) or "none",
            "refused": "; ".join(
                f"{entry['form']}: {entry['refused']}" for entry in entries if entry["refused"]
            )
            or skipped,
            "not_read": "; ".join(failed) or None,
            "asked": len(asked),
            **shares,
        }
    )


def _one(
    form: str,
    merged: Path,
    base: Path,
    adapter: Path | None,
    job: Job,
    settings: Settings,
    asked: list[Any],
    expected: list[Expected],
    report: Report,
) -> dict[str, Any]:
    """Return what there is to say of one form. What fails is this form's failure, or one reader's of it; the others are made."""
    from ft_assets.export import readers
    from ft_assets.export.formats import GGUF, make_form

    folder, most = job.output / form, settings.max_new_tokens
    facts = settings.model_dump(include={"name", "license", "llama_cpp", "base", "revision"})
    try:
        made = make_form(form, merged, base, adapter, folder, {**facts, "asked": asked})
        file = folder / made["file"] if form in GGUF else folder
        carried = readers.carried_over(file, merged) if form in GGUF else {}
    except Exception as error:  # torch, CUDA, the gguf package and the disk raise anything
        shutil.rmtree(folder, ignore_errors=True)
        report("refused", form=form)
        return {"form": form, "refused": _reason(error)}
    by: dict[str, Callable[[], Found | None]] = {
        "transformers": lambda: readers.by_transformers(folder, asked, expected, most)
    }
    if form in GGUF:
        by = {
            "transformers": lambda: readers.by_transformers_gguf(file, asked, expected, most),
            "llama.cpp": lambda: readers.by_llama_cpp(file, asked, expected, most),
        }
    elif form == "adapter":
        by = {"peft": lambda: readers.by_adapter(base, folder, asked, expected, most)}
    shares, failed = dict[str, dict[str, float]](), dict[str, str]()
    for reader, ask in by.items():
        try:
            if (found := ask()) is not None:
                shares[reader] = readers.agreement(expected, found)
        except (
            Exception
        ) as error:  # memory that is too small, a reader that does not know this architecture
            failed[reader] = _reason(error)
        free_unused()
    report(
        "exported",
        form=form,
        **{f"top-1 {reader}": share["top1"] for reader, share in shares.items()},
    )
    return {
        "form": form,
        "refused": None,
        "agreement": shares,
        "failed": failed,
        "carried_over": carried,
        **made,
    }


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return (
        ";".join(lines)
        if isinstance(error, FtError)
        else f"{type(error).__name__}: {lines[0][:200]}"
    )


def page(document: dict[str, Any]) -> str:
    """Return what was exported, for a person."""
    lines = [
        f"Each form was asked {document['asked']} held-out prompts. Top-1: the share of the merged model's {document['tokens']} answer tokens "
        f"({document['logits_in']}) that are the form's most likely ones too, near-ties excepted. Greedy: the share of equal greedy answers, "
        "which part at the first near-tie."
    ]
    if document["skipped"]:
        lines = [
            f"Nothing was exported: {document['skipped']}. `release.forms` names forms, `release.llama_cpp` a converter."
        ]
    lines += [
        "",
        "| form | size | top-1 | greedy | carried over | serve it |",
        "|---|---|---|---|---|---|",
    ]
    for entry in document["forms"]:
        if entry["refused"]:
            lines.append(f"| {entry['form']} | – | refused | – | – | {entry['refused']} |")
            continue
        shares = [
            ", ".join(f"{reader} {share[kind]:.3f}" for reader, share in entry["agreement"].items())
            for kind in ("top1", "greedy")
        ]
        carried = (
            ", ".join(
                name.replace("_", " ") + ("" if good else " **NOT**")
                for name, good in entry["carried_over"].items()
            )
            or "–"
        )
        commands = "<br>".join(f"`{line}`" for line in entry["serve"])
        lines.append(
            f"| {entry['form']} | {entry['bytes'] / 1e9:.3f} GB | {' | '.join(shares)} | {carried} | {commands} |"
        )
    notes = [
        f"- {entry['form']}: {note}"
        for entry in document["forms"]
        for note in entry.get("notes", [])
    ]
    notes += [
        f"- {entry['form']}: {reader} did not read it: {reason}"
        for entry in document["forms"]
        for reader, reason in entry.get("failed", {}).items()
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    main(step)
