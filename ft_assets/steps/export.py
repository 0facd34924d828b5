"""Step: write the champion's serving forms, ask each what the merged model was asked, and state how far they agree."""

import json
import shutil
from pathlib import Path
from typing import Any

from ft_assets.artifacts import Artifact, verify_files
from ft_assets.data.tables import read_table
from ft_assets.errors import ReleaseError
from ft_assets.job import Job, Report, StepResult
from ft_assets.release import readers
from ft_assets.release.export_gguf import why_not
from ft_assets.release.forms import GGUF, make_form
from ft_assets.steps._run import main


def step(job: Job, report: Report) -> StepResult:
    merged, base, adapter = job.inputs["champion"], job.inputs["base_model"], job.inputs.get("champion_adapter")
    verify_files(Artifact(merged, json.loads((merged / "manifest.json").read_text())))
    forms, most = job.settings["forms"], job.settings["max_new_tokens"]
    skipped = None
    if forms is None:
        skipped = None if job.settings["facts"]["llama_cpp"] else why_not(merged)
        forms = [] if skipped else ["gguf-q8_0"]
    rows = sorted(read_table(job.inputs["heldout_split"] / "heldout.parquet"), key=lambda row: row["id"])[: job.settings["smoke_rows"]]
    asked = [row["messages"][:-1] for row in rows]
    expected = readers.by_merged(merged, asked, most) if forms else []
    entries = [_one(form, merged, base, adapter, job, asked, expected, report) for form in forms]
    document = {"asked": len(asked), "forms": entries, "skipped": skipped}
    (job.output / "export.json").write_text(json.dumps(document, indent=1, ensure_ascii=False))
    (job.output / "README.md").write_text(page(document), encoding="utf-8")
    made = [entry for entry in entries if entry["refused"] is None]
    agreements = {f"{entry['form']}_agreement": min(entry["agreement"].values()) for entry in made}
    return StepResult(
        {
            "forms": ", ".join(entry["form"] for entry in made) or "none",
            "refused": "; ".join(f"{entry['form']}: {entry['refused']}" for entry in entries if entry["refused"]) or skipped,
            "asked": len(asked),
            **agreements,
        }
    )


def _one(
    form: str, merged: Path, base: Path, adapter: Path | None, job: Job, asked: list[Any], expected: list[str], report: Report
) -> dict[str, Any]:
    folder, most = job.output / form, job.settings["max_new_tokens"]
    try:
        made = make_form(form, merged, base, adapter, folder, {**job.settings["facts"], "asked": asked})
    except ReleaseError as error:
        shutil.rmtree(folder, ignore_errors=True)
        report("refused", form=form)
        return {"form": form, "refused": str(error).replace("\n", ";")}
    found: dict[str, list[str] | None] = {}
    carried: dict[str, bool] = {}
    if form in GGUF:
        file = folder / made["file"]
        carried = readers.carried_over(file, merged)
        found = {"transformers": readers.by_transformers_gguf(file, asked, most), "llama.cpp": readers.by_llama_cpp(file, asked, most)}
    elif form == "nf4":
        found = {"transformers": readers.by_transformers(folder, asked, most)}
    else:
        found = {"peft": readers.by_adapter(base, folder, asked, most)}
    shares = {reader: readers.agreement(expected, answers) for reader, answers in found.items() if answers is not None}
    report("exported", form=form, **{f"agreement {reader}": share for reader, share in shares.items()})
    return {"form": form, "refused": None, "agreement": shares, "carried_over": carried, **made}


def page(document: dict[str, Any]) -> str:
    """Return what was exported, for a person."""
    lines = [
        f"Each form was asked {document['asked']} held-out prompts; agreement is the share of greedy answers equal to the merged model's."
    ]
    if document["skipped"]:
        lines += ["", f"Nothing was exported: {document['skipped']}. `release.forms` names forms, `release.llama_cpp` a converter."]
    lines += ["", "| form | size | agreement | carried over | serve it |", "|---|---|---|---|---|"]
    for entry in document["forms"]:
        if entry["refused"]:
            lines.append(f"| {entry['form']} | – | refused | – | {entry['refused']} |")
            continue
        shares = ", ".join(f"{reader} {share:.2f}" for reader, share in entry["agreement"].items())
        carried = ", ".join(name.replace("_", " ") + ("" if good else " **NOT**") for name, good in entry["carried_over"].items()) or "–"
        commands = "<br>".join(f"`{line}`" for line in entry["serve"])
        lines.append(f"| {entry['form']} | {entry['bytes'] / 1e9:.3f} GB | {shares} | {carried} | {commands} |")
        lines += []
    notes = [f"- {entry['form']}: {note}" for entry in document["forms"] for note in entry.get("notes", [])]
    return "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    main(step)
