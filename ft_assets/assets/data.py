"""Assets before a tokenizer is needed: the data files, the validated rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa

from ft_assets.artifacts import Artifact, file_sha256
from ft_assets.assets.workshop import Workshop, result, user_errors
from ft_assets.config import Project
from ft_assets.data.canonical import Validated, conversation, preference, validate
from ft_assets.data.formats import read_rows, resolve_files
from ft_assets.data.tables import CONVERSATION, PREFERENCE, REJECTED, read_table, rows_version, write_table
from ft_assets.errors import DataError
from ft_assets.job import StepResult

OWNERS = ["team:ml"]
GROUP = "data"

data_files = dg.AssetSpec(
    "data_files",
    description="The files that finetune.yaml names under `data`. A sensor reports a new version when their content changes.",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"file"},
)


def schema_metadata(schema: pa.Schema) -> dict[str, Any]:
    """Return the column schema for the UI."""
    return {"dagster/column_schema": dg.TableSchema([dg.TableColumn(field.name, str(field.type)) for field in schema])}


def data_content(project: Project, keys: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return, for each key of `data`, its files with their hashes: what decides the rows."""
    settings = project.data.model_dump()
    return {
        key: [
            (str(path.relative_to(project.root) if path.is_relative_to(project.root) else path), file_sha256(path))
            for path in resolve_files(project.root, settings[key], f"data.{key}")
        ]
        for key in keys
    }


def read_validated(project: Project, key: str, form: Callable[[dict[str, Any]], dict[str, Any]]) -> Validated:
    """Return the valid rows of one key of `data`. Raises DataError with the first bad rows if there are too many."""
    files = resolve_files(project.root, getattr(project.data, key), f"data.{key}")
    columns = {name: given for name, given in project.data.columns.items() if name == key}
    validated = validate((row for path in files for row in read_rows(path, project.data.encoding)), form, *columns.values())
    if validated.invalid_share > project.data.max_invalid:
        first = "\n".join(f"    {row['where']}: {row['problem']}" for row in validated.rejected[:5])
        raise DataError(
            f"data.{key}",
            f"{len(validated.rejected)} of {validated.total} rows cannot be used:\n{first}",
            f"at most {project.data.max_invalid:.1%} (data.max_invalid)",
            "correct the rows, or raise data.max_invalid to leave them out",
        )
    return validated


def _reading(project: Project) -> dict[str, Any]:
    """Return the settings that decide how rows are read."""
    return project.data.model_dump(mode="json", include={"max_invalid", "columns", "encoding"})


def _first(rejected: list[dict[str, Any]]) -> str | None:
    return f"{rejected[0]['where']}: {rejected[0]['problem']}" if rejected else None


def _sample(artifact: Artifact, name: str) -> Any:
    rows = read_table(artifact.path / f"{name}.parquet")[:5]
    lines = ["| id | turns |", "|---|---|"]
    for row in rows:
        turns = "<br>".join(f"**{turn['role']}** {turn['content']}" for turn in row["messages"]).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{row['id'][:8]}` | {turns} |")
    return dg.MetadataValue.md("\n".join(lines))


@dg.asset(
    deps=[data_files], group_name=GROUP, owners=OWNERS, kinds={"json", "parquet"}, code_version="2", metadata=schema_metadata(CONVERSATION)
)
def raw_dataset(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
    """Validated conversations in one canonical form, each with a stable id: for training, held-out, retention and few-shot."""
    keys = {"train": "conversations", "rehearsal": "rehearsal", "heldout": "heldout", "retention": "retention", "few_shot": "few_shot"}

    def make(output: Path) -> StepResult:
        metrics: dict[str, Any] = {}
        parts, rejected = {}, []
        for key, name in keys.items():
            validated = read_validated(workshop.project, key, conversation)
            write_table(output / f"{name}.parquet", validated.rows, CONVERSATION)
            parts[name] = rows_version(validated.rows)
            rejected += validated.rejected
            metrics |= {
                f"{name}_rows": len(validated.rows),
                f"{name}_duplicates": validated.duplicates,
                f"{name}_rejected": len(validated.rejected),
            }
        (output / "info").mkdir()
        write_table(output / "info" / "rejected.parquet", rejected, REJECTED)
        return StepResult(
            {
                **metrics,
                "rejected": len(rejected),
                "first_rejected": _first(rejected),
            },
            parts,
        )

    with user_errors():
        settings = {"files": data_content(workshop.project, list(keys)), **_reading(workshop.project)}
        artifact, reused = workshop.materialize(context, settings=settings, make=make)
    return result(
        artifact, reused, sample=_sample(artifact, "conversations"), **{"dagster/row_count": artifact.metrics["conversations_rows"]}
    )


@dg.asset(
    deps=[data_files], group_name=GROUP, owners=OWNERS, kinds={"json", "parquet"}, code_version="2", metadata=schema_metadata(PREFERENCE)
)
def raw_preferences(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
    """Validated preference triples: a prompt, the chosen answer, the rejected one. Empty if finetune.yaml names none."""

    def make(output: Path) -> StepResult:
        validated = read_validated(workshop.project, "preferences", preference)
        write_table(output / "preferences.parquet", validated.rows, PREFERENCE)
        (output / "info").mkdir()
        write_table(output / "info" / "rejected.parquet", validated.rejected, REJECTED)
        metrics = {"rows": len(validated.rows), "duplicates": validated.duplicates, "rejected": len(validated.rejected)}
        return StepResult(
            {
                **metrics,
                "first_rejected": _first(validated.rejected),
            },
            {"preferences": rows_version(validated.rows)},
        )

    with user_errors():
        settings = {"files": data_content(workshop.project, ["preferences"]), **_reading(workshop.project)}
        artifact, reused = workshop.materialize(context, settings=settings, make=make)
    return result(artifact, reused, sample=_sample(artifact, "preferences"), **{"dagster/row_count": artifact.metrics["rows"]})


@dg.asset_check(asset=raw_dataset, blocking=True, description="Every row of the data files could be read, or few enough could not.")
def rows_are_valid(workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
    """Fail above data.max_invalid, warn if any row was left out."""
    metrics = workshop.store.need("raw_dataset", None).metrics
    rejected, total = metrics["rejected"], metrics["conversations_rows"] + metrics["rejected"]
    share = rejected / total if total else 1.0
    text = f"{rejected} of {total} rows were left out" + (f", first {metrics['first_rejected']}" if rejected else "")
    return dg.AssetCheckResult(
        passed=rejected == 0,
        severity=dg.AssetCheckSeverity.ERROR if share > workshop.project.data.max_invalid else dg.AssetCheckSeverity.WARN,
        description=text,
    )


ASSETS = [data_files, raw_dataset, raw_preferences]
CHECKS = [rows_are_valid]
