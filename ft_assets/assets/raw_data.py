"""Assets before a tokenizer is needed: the data files, the validated rows."""

import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa

from ft_assets.artifacts import Artifact
from ft_assets.config import Project
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.content import CONVERSATIONS, Hashes, data_content
from ft_assets.data.file_formats import RawRow, read_rows, resolve_files
from ft_assets.data.ingest import Ingest, target, worst
from ft_assets.data.kto import pair_labels
from ft_assets.data.tables import CONVERSATION, PREFERENCE, REJECTED, TableWriter, read_table
from ft_assets.errors import DataError
from ft_assets.job import StepResult
from ft_assets.orchestration.materializer import Materializer, result, user_errors

OWNERS = ["team:ml"]
GROUP = "data"
COLUMNS = {
    "id": "Hash of the content: the same row has the same id in every file and order.",
    "group": "Rows of one group stay on one side of the split: the same prompt, or the row's own `group`.",
    "stratum": "The value of the field that data.stratify names.",
    "messages": "The turns, as role and content; calls as JSON; train: false on answers that are context only.",
    "tools": "The tools that were offered, as JSON.",
    "source": "The file it came from.",
    "digest": "Hash of all that the row says; versions are made of it.",
    "judged": "A whole conversation that ends in an answer: only such a row can be held out.",
    "input_ids": "Tokens of the conversation in this model's own template.",
    "supervised": "Which of them the loss is of: answers and their end of turn.",
}


data_files = dg.AssetSpec(
    "data_files",
    description="The files that finetune.yaml names under `data`. A sensor reports a new version when their content changes.",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"file"},
)


def schema_metadata(schema: pa.Schema) -> dict[str, Any]:
    """Return the column schema for the UI."""
    return {
        "dagster/column_schema": dg.TableSchema(
            [
                dg.TableColumn(field.name, str(field.type), description=COLUMNS.get(field.name))
                for field in schema
            ]
        )
    }


def _rows(project: Project, key: str) -> Iterable[RawRow]:
    """Yield the rows of a key's files, each under our names for its columns; labelled answers to one prompt as pairs."""
    form = named(project, "format", key)
    files = resolve_files(project.root, getattr(project.data, key), f"data.{key}")
    rows = (row for path in files for row in read_rows(path, project.data.encoding, form))
    return pair_labels(rows, form, named(project, "columns", key)) if key == "preferences" else rows


def named(project: Project, setting: str, key: str) -> Any:
    """Return what data.columns or data.format says of a key, or None."""
    return {str(name): value for name, value in getattr(project.data, setting).items()}.get(key)


def _reading(project: Project) -> dict[str, Any]:
    """Return the settings that decide how rows are read."""
    return project.data.model_dump(
        mode="json", include={"columns", "format", "encoding", "stratify"}
    )


def _ingest(
    project: Project,
    output: Path,
    files: Hashes,
    sources: Mapping[str, tuple[str, Any]],
    schema: pa.Schema,
) -> StepResult:
    """Write each source, {key of data: (table, form)}, and the rejected rows of all. Raises DataError if `files` are no longer those."""
    metrics: dict[str, Any] = {}
    parts, first = {}, []
    stratify = project.data.stratify
    with (
        tempfile.TemporaryDirectory(dir=output) as scratch,
        TableWriter(output / "info" / "rejected.parquet", REJECTED) as rejected,
    ):
        ingest = Ingest(output, Path(scratch), rejected)
        for key, (name, form) in sources.items():
            columns = (
                named(project, "columns", key) if key != "preferences" else None
            )  # renamed there already
            stratum = stratify.field if stratify and key == "train" else None
            formed = (
                partial(form, format=wanted) if (wanted := named(project, "format", key)) else form
            )
            done = ingest.source(name, _rows(project, key), formed, schema, columns, stratum)
            if done.total or not metrics:  # a source that is not named has nothing to say
                metrics |= done.metrics(name)
            parts[name] = done.version
            first += done.first
    _require_still(project, files)
    rejected_rows = sum(value for key, value in metrics.items() if key.endswith("_rejected"))
    return StepResult(
        {**metrics, "rejected": rejected_rows, "first_rejected": "\n".join(first[:5]) or None},
        parts,
    )


def _require_still(project: Project, files: Hashes) -> None:
    """Raise DataError if a file has another content than before it was read: these rows would be stored as those of the old one."""
    for key, now in data_content(project, list(files)).items():
        if now != files[key]:
            name = next(name for name, _ in sorted(set(now) ^ set(files[key])))
            raise DataError(
                where=f"finetune.yaml: data.{key}: {name}",
                found="changed while it was read",
                expected="files that are still",
                fix="run again",
            )


def _sample(artifact: Artifact, name: str) -> Any:
    rows = read_table(artifact.path / f"{name}.parquet", limit=5)
    lines = ["| id | turns |", "|---|---|"]
    for row in rows:
        turns = (
            "<br>".join(f"**{turn['role']}** {turn['content']}" for turn in row["messages"])
            .replace("|", "\\|")
            .replace("\n", " ")
        )
        lines.append(f"| `{row['id'][:8]}` | {turns} |")
    return dg.MetadataValue.md("\n".join(lines))


def _rejected(artifact: Artifact) -> dict[str, Any]:
    """Return the first rejected rows as a table to look at; all of them lie in info/rejected.parquet."""
    rows = read_table(artifact.path / "info" / "rejected.parquet", limit=20)
    if not rows:
        return {}
    lines = ["| where | problem | row |", "|---|---|---|"]
    for row in rows:
        cells = (
            row["where"],
            row["problem"],
            f"`{row['row'][:200].replace('`', ' ')}`" if row["row"] else "",
        )
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        )
    return {"rejected_rows": dg.MetadataValue.md("\n".join(lines))}


@dg.asset(
    deps=[data_files],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"json", "parquet"},
    code_version="4",
    metadata=schema_metadata(CONVERSATION),
)
def raw_dataset(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """Validated conversations in one canonical form, each with a stable id: for training, held-out, retention and few-shot."""
    project = materializer.project
    sources = {
        key: (name, target if key == "contamination" else conversation)
        for key, name in CONVERSATIONS.items()
    }
    with user_errors():
        files = data_content(project, list(sources))
        artifact, reused = materializer.materialize(
            context,
            settings={"files": files, **_reading(project)},
            make=lambda output: _ingest(project, output, files, sources, CONVERSATION),
        )
        return result(
            artifact,
            reused,
            sample=_sample(artifact, "conversations"),
            **_rejected(artifact),
            **{"dagster/row_count": artifact.metrics["conversations_rows"]},
        )


@dg.asset(
    deps=[data_files],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"json", "parquet"},
    code_version="4",
    metadata=schema_metadata(PREFERENCE),
)
def raw_preferences(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """Validated preference triples: a prompt, the chosen answer, the rejected one. Empty if finetune.yaml names none."""
    project = materializer.project
    with user_errors():
        files = data_content(project, ["preferences"])
        artifact, reused = materializer.materialize(
            context,
            settings={"files": files, **_reading(project)},
            make=lambda output: _ingest(
                project, output, files, {"preferences": ("preferences", preference)}, PREFERENCE
            ),
        )
        return result(
            artifact,
            reused,
            sample=_sample(artifact, "preferences"),
            **_rejected(artifact),
            **{"dagster/row_count": artifact.metrics["preferences_rows"]},
        )


def _validity(materializer: Materializer, asset: str) -> dg.AssetCheckResult:
    """Fail if more than data.max_invalid of a source was left out, warn if any row was."""
    metrics, most = (
        materializer.store.need(asset, None).metrics,
        materializer.project.data.max_invalid,
    )
    name, rejected, total = worst(metrics)
    share = rejected / total if total else 0.0
    text = (
        f"{rejected} of {total} rows of {name} cannot be used"
        if rejected
        else "every row can be used"
    )
    if rejected:
        text += f" (data.max_invalid: {most:.1%}):\n{metrics['first_rejected']}"
    doubles = sum(value for key, value in metrics.items() if key.endswith("_duplicates"))
    return dg.AssetCheckResult(
        passed=rejected == 0,
        severity=dg.AssetCheckSeverity.ERROR if share > most else dg.AssetCheckSeverity.WARN,
        description=text,
        metadata={"rejected": metrics["rejected"], "duplicates": doubles},
    )


@dg.asset_check(
    asset=raw_dataset,
    blocking=True,
    description="Every row of the data files can be used, or few enough cannot.",
)
@user_errors()
def rows_are_valid(materializer: dg.ResourceParam[Materializer]) -> dg.AssetCheckResult:
    """Fail above data.max_invalid in any source, warn if any row was left out."""
    return _validity(materializer, "raw_dataset")


@dg.asset_check(
    asset=raw_preferences,
    blocking=True,
    description="Every preference pair can be used, or few enough cannot.",
)
@user_errors()
def pairs_are_valid(materializer: dg.ResourceParam[Materializer]) -> dg.AssetCheckResult:
    """Fail above data.max_invalid, warn if any pair was left out."""
    return _validity(materializer, "raw_preferences")


ASSETS = [data_files, raw_dataset, raw_preferences]
CHECKS = [rows_are_valid, pairs_are_valid]
