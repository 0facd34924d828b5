"""Read, validate and store the rows of data files: what the raw assets share."""

import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import JsonValue

from ft_assets.artifacts import Artifact
from ft_assets.config import Project
from ft_assets.data.audit import Audit
from ft_assets.data.content import PRODUCTION, PROMPTS, TEXT, Hashes, data_content
from ft_assets.data.encodings import encoding_of
from ft_assets.data.file_formats import RawRow, read_rows
from ft_assets.data.ingest import UNREAD, Canonical, Ingest, Ingested, worst
from ft_assets.data.kto import Lone, pair_labels
from ft_assets.data.mixing import source_rows
from ft_assets.data.origins import PART as ORIGINS
from ft_assets.data.origins import Names, OriginWriter, files_of, named, names_of, several
from ft_assets.data.streams import printable
from ft_assets.data.tables import REJECTED, Layout, TableWriter, read_table
from ft_assets.data.threads import join_threads
from ft_assets.errors import DataError
from ft_assets.job import StepResult
from ft_assets.markdown import table as markdown_table
from ft_assets.orchestration.declarations import Checked
from ft_assets.orchestration.links import rows_path
from ft_assets.orchestration.materializer import ERROR, WARN, Materializer, result
from ft_assets.rows.cells import plain
from ft_assets.rows.columns import Columns
from ft_assets.rows.transcripts import declared, transcribed
from ft_assets.rows.turn_keys import without_keys
from ft_assets.rows.types import DataRow, RawFields, RejectedRow

ToCanonical = Callable[..., Any]  # of a raw row, and of its format if the key can have one
# Rows that are used in another form than they have in their file, by the ending of their metric.
ADAPTED = {
    "_with_joined_turns": "rows have user turns in a row, which became one turn",
    "_opened_by_assistant": "rows open with the assistant's turn, which is context only",
    "_ties": "rows are ties, which are no pairs",
    "_unanswered": "messages of trees have no answer, and no thread to stand in",
    "_unpaired": "labelled answers have no partner and are left out",
    "_labels": "labelled answers have no partner: KTO trains them",
    "_unlabelled": "answers have no label",
    "_disputed": "pairs are left out because people disagree",
}
Sources = Mapping[str, tuple[str, ToCanonical]]  # {key of data: (table, its rows' form)}


def ingested(
    context: dg.AssetExecutionContext,
    materializer: Materializer,
    sources: Sources,
    layout: Layout[Any],
    table: str,
) -> dg.MaterializeResult:
    """Materialize the rows of `sources` and show a sample of `table`."""
    project = materializer.project
    files = data_content(project, list(sources))
    for key in several(project.data):
        if key in sources:  # a weight, which is not in the identity, needs each file in one entry
            files_of(project, key)
    artifact, reused = materializer.materialize(
        context,
        identity={
            "files": files,
            **_reading(project),
            **_labels(project, sources),
            **_entries(project, sources),
        },
        make=lambda output: _write(project, output, files, sources, layout),
    )
    return result(
        artifact,
        reused,
        first=(f"{table}_rows", "rejected"),
        rows_page=dg.MetadataValue.url(rows_path(table=table)),
        sample=_sample(artifact, table),
        **_sources(project, sources, artifact),
        **_rejected(artifact),
        **{"dagster/row_count": artifact.metrics[f"{table}_rows"]},
    )


def _reading(project: Project) -> dict[str, JsonValue]:
    """Return the settings that decide how rows are read."""
    return project.data.model_dump(
        mode="json",
        include={
            *("columns", "format", "encoding", "stratify"),
            *("transcript", "ignore_turn_keys", "min_agreement"),
        },
    )


def _labels(project: Project, sources: Sources) -> dict[str, JsonValue]:
    lone = lone_answers(project) if "preferences" in sources else "auto"
    return {"lone_answers": lone} if lone != "auto" else {}


def _entries(project: Project, sources: Sources) -> dict[str, JsonValue]:
    """Return the entries of the trained keys that have several: each row has one."""
    keys = [key for key in several(project.data) if key in sources]
    return (
        {"entries": {key: [one.name for one in project.data.sources(key)] for key in keys}}
        if keys
        else {}
    )


def _write(
    project: Project, output: Path, files: Hashes, sources: Sources, layout: Layout[Any]
) -> StepResult:
    """Write a table a source, and one table with the rejected rows of all sources.

    Raises DataError if a file changed after `files` were hashed.
    """
    metrics: dict[str, int | str] = {}
    parts: dict[str, str] = {}
    first: list[str] = []
    with (
        tempfile.TemporaryDirectory(dir=output) as scratch,
        TableWriter(output / "info" / "rejected.parquet", REJECTED) as rejected,
    ):
        ingest = Ingest(output, Path(scratch), rejected)
        read = {key: files_of(project, key) for key in sources}
        names = names_of({path: file for found in read.values() for path, file in found.items()})
        for key, (table, form) in sources.items():
            done = read_source(project, ingest, key, table, form, layout, names=names)
            if key == "train" and not done.total:
                raise DataError(
                    where="data.train",
                    found=f"{', '.join(names[path] for path in read[key])}: no rows",
                    expected="at least one conversation",
                    fix="put rows into the files, or name other files",
                )
            if done.total or not metrics:  # no metrics for a source that finetune.yaml omits
                metrics |= done.metrics(table)
            parts[table] = done.version
            first += done.first
    if keys := [key for key in several(project.data) if key in sources]:
        with OriginWriter(output / f"{ORIGINS}.parquet") as origins:
            for key in keys:
                origins.add(key, output / f"{sources[key][0]}.parquet", read[key], names)
        parts[ORIGINS] = origins.version
    _require_unchanged(project, files)
    count = sum(int(value) for key, value in metrics.items() if key.endswith("_rejected"))
    shown = "\n".join(first[:5]) or None
    return StepResult({**metrics, "rejected": count, "first_rejected": shown}, parts)


def read_source(
    project: Project,
    ingest: Ingest,
    key: str,
    table: str,
    form: ToCanonical,
    layout: Layout[Any],
    most: int | None = None,
    names: Names | None = None,
) -> Ingested:
    """Write the table of a key of `data`, of its first `most` raw rows if that is given.

    `names` are those of the files in messages, where files of other keys are read too.
    """
    files = files_of(project, key)
    return ingest.source(
        table,
        itertools.islice(_rows(project, key, files, names or names_of(files)), most),
        _with_format(project, key, form),
        layout,
        _columns(project, key),
        _stratum(project, key),
        project.data.min_agreement,
        _audit(project, key),
    )


def _rows(project: Project, key: str, files: Iterable[Path], names: Names) -> Iterable[RawRow]:
    """Yield the rows of a key's files. Labelled answers to one prompt come as pairs."""
    row_format = _of_key(project, "format", key)
    encoding = project.data.encoding
    rows = (
        row
        for path in files
        for row in named(
            read_rows(path, encoding_of(path, project.root, encoding), row_format),
            printable(path),
            names[path],
        )
    )
    rows = _as_declared(project, rows)
    if row_format is None:
        rows = join_threads(rows, "rankings" if key == "preferences" else "conversations")
    if key != "preferences":
        return rows
    return pair_labels(rows, row_format, _of_key(project, "columns", key), lone_answers(project))


def lone_answers(project: Project) -> Lone:
    """Return what happens to labelled answers without a partner: some base may train by KTO."""
    methods = {project.recipe(name).dpo.method for name in project.base_models}
    if "kto" in methods:
        return "use"
    return "auto" if "auto" in methods else "leave"


def _as_declared(project: Project, rows: Iterable[RawRow]) -> Iterable[RawRow]:
    """Return the rows without `data.ignore_turn_keys`, their transcripts as turns."""
    marks, ignored = project.data.transcript, project.data.ignore_turn_keys
    if not marks and not ignored:
        return rows
    form = declared({str(role): mark for role, mark in marks.items()}) if marks else None

    def changed(value: RawFields) -> RawFields:
        return without_keys(transcribed(plain(value), form) if form else plain(value), ignored)

    return (row if row.value is None else RawRow(row.where, changed(row.value)) for row in rows)


def _of_key(project: Project, setting: str, key: str) -> Any:
    """Return the entry of data.columns or data.format for a key, or None."""
    if setting == "format" and key == TEXT:
        return TEXT
    return {str(name): value for name, value in getattr(project.data, setting).items()}.get(key)


def _with_format(project: Project, key: str, form: ToCanonical) -> Canonical:
    row_format = _of_key(project, "format", key)
    return partial(form, format=row_format) if row_format else form


def _columns(project: Project, key: str) -> Mapping[str, str] | None:
    """Return the columns to rename. `pair_labels` has renamed those of preferences already."""
    return None if key == "preferences" else _of_key(project, "columns", key)


def _stratum(project: Project, key: str) -> str | None:
    stratify = project.data.stratify
    return stratify.field if stratify and key == "train" else None


def _audit(project: Project, key: str) -> Audit | None:
    """Return the audit of a source. It has none if its answers are not read."""
    data = project.data
    if key in ("contamination", PRODUCTION, PROMPTS):
        return None
    ignored = {*data.ignored, *([data.stratify.field] if data.stratify else [])}
    columns = Columns(
        key == "preferences",
        _of_key(project, "format", key),
        _of_key(project, "columns", key) or {},
        frozenset(ignored),
    )
    return Audit(key, columns, data.max_echoed)


def _require_unchanged(project: Project, files: Hashes) -> None:
    """Raise DataError if a file changed while it was read.

    Its rows would be stored under the hash of its former content.
    """
    for key, now in data_content(project, list(files)).items():
        if now != files[key]:
            name = next(name for name, _ in sorted(set(now) ^ set(files[key])))
            raise DataError(
                where=f"finetune.yaml: data.{key}: {name}",
                found="changed while it was read",
                expected="a file that does not change during the run",
                fix="run again",
            )


def _sample(artifact: Artifact, table: str) -> dg.MarkdownMetadataValue:
    lines = ["| id | turns |", "|---|---|"]
    for row in read_table(artifact.path / f"{table}.parquet", limit=5, row=DataRow):
        turns = "<br>".join(f"**{turn['role']}** {turn['content']}" for turn in row["messages"])
        lines.append(f"| `{row['id'][:8]}` | {_cell(turns)} |")
    return dg.MetadataValue.md("\n".join(lines))


def _sources(
    project: Project, sources: Sources, artifact: Artifact
) -> dict[str, dg.MarkdownMetadataValue]:
    """Return the number of rows of each entry of data.train and data.rehearsal."""
    if "train" not in sources or len(rows := source_rows(project.data, artifact.path)) < 2:
        return {}
    shown = [[name, f"{count:,}"] for name, count in rows]
    return {"sources": dg.MetadataValue.md(markdown_table(["source", "rows"], shown))}


def _rejected(artifact: Artifact) -> dict[str, dg.MarkdownMetadataValue]:
    """Return the first 20 rejected rows as a table. info/rejected.parquet has all of them."""
    rows = read_table(artifact.path / "info" / "rejected.parquet", limit=20, row=RejectedRow)
    if not rows:
        return {}
    lines = ["| where | problem | row |", "|---|---|---|"]
    for row in rows:
        text = f"`{row['row'][:200].replace('`', ' ')}`" if row["row"] else ""
        lines.append(f"| {_cell(row['where'])} | {_cell(row['problem'])} | {_cell(text)} |")
    return {"rejected_rows": dg.MetadataValue.md("\n".join(lines))}


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def validity(checked: Checked) -> dg.AssetCheckResult:
    """Fail if more than data.max_invalid of a source was rejected. Warn if any row was."""
    metrics, most = checked.metrics, checked.project.data.max_invalid
    name, rejected, total = worst(metrics)
    share = rejected / total if total else 0.0
    text = "every row can be used"
    if rejected:
        text = f"{rejected} of {total} rows of {name} cannot be used"
        text += f" (data.max_invalid: {most:.1%}):\n{metrics['first_rejected']}"
    for ending, what in ADAPTED.items():
        if count := sum(value for key, value in metrics.items() if key.endswith(ending)):
            text += f"; {count} {what}"
    duplicates = sum(value for key, value in metrics.items() if key.endswith("_duplicates"))
    return dg.AssetCheckResult(
        passed=rejected == 0,
        severity=ERROR if share > most else WARN,
        description=text,
        metadata={"rejected": metrics["rejected"], "duplicates": duplicates},
    )


def read_columns(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the text columns that are read for nothing, and with their numbers of rows."""
    unread = {
        key.removesuffix(UNREAD): value
        for key, value in checked.metrics.items()
        if key.endswith(UNREAD)
    }
    text = "every text column is read"
    if unread:
        text = "not read: " + "; ".join(f"{name}: {found}" for name, found in unread.items())
        text += ". Write what the model needs into the prompt; name the others in data.ignored"
    return dg.AssetCheckResult(passed=not unread, severity=WARN, description=text)
