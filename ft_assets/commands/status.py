"""`ft status`: the current artifacts and their key numbers. `ft plan` shows what is stale."""

import functools
import time
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, field_serializer

from ft_assets.artifacts import Artifact, ArtifactStore, open_store
from ft_assets.assets import declared
from ft_assets.commands.store_view import columns, free_bytes, in_bytes, in_utc, size, versions
from ft_assets.config import Project
from ft_assets.data.left_out import counted, left_out_rows
from ft_assets.data.mixing import SourceLine, read_sources, source_name
from ft_assets.errors import ArtifactError
from ft_assets.orchestration.declarations import Summary
from ft_assets.rows.types import LeftOutRow

NOT_MADE = "–"
LEAVING = ("raw_dataset", "raw_preferences", "chat_dataset", "heldout_split")
OF_TEXT = ("raw_text", "text_dataset")  # the same, where a project has data.text
OWN = ("own_rehearsal",)  # the same, with `data.rehearsal: self`


class Line(BaseModel, frozen=True):
    """The current version of one asset. Without one, all fields but the names are None."""

    asset: str
    partition: str | None
    fingerprint: str | None = None
    made: float | None = None  # seconds since 1970
    seconds: float | None = None
    key: str | None = None
    problem: str | None = None

    @field_serializer("made")
    def _in_utc(self, made: float | None) -> str | None:
        return None if made is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(made))


class Status(BaseModel, frozen=True):
    """The state of a project's store."""

    store: str
    bytes: int
    free_bytes: int
    versions: int
    unpartitioned: list[Line]
    base_models: dict[str, list[Line]]
    left_out: dict[str, dict[str, int]]  # {base model: {reason: rows that are left out}}
    sources: dict[str, list[SourceLine]]  # {base model: what each entry of the data gives}
    elsewhere: list[str]  # versions of the store that are not of finetune.yaml


def status(project: Project, assets: Sequence[tuple[str, bool]]) -> Status:
    """Return the state of the store. `assets` are (name, partitioned by base model), in order."""
    store = open_store(project)
    found, _ = versions(store)
    known = {
        (asset, partition)
        for asset, partitioned in assets
        for partition in (project.base_models if partitioned else [None])
    }
    return Status(
        store=project.store_url or str(store.root),
        bytes=sum(store.bytes_of(version.artifact) for version in found)
        if project.store_url
        else size(store.root),
        free_bytes=free_bytes(store.root),
        versions=len(found),
        unpartitioned=[
            _line(store, asset, None) for asset, partitioned in assets if not partitioned
        ],
        base_models={
            name: [_line(store, asset, name) for asset, partitioned in assets if partitioned]
            for name in project.base_models
        },
        left_out=left_out_counts(project, store, project.base_models),
        sources={name: sources(store, name) for name in project.base_models},
        elsewhere=sorted(
            {version.where for version in found if (version.asset, version.partition) not in known}
        ),
    )


def _made(project: Project, store: ArtifactStore, name: str) -> list[Artifact]:
    """Return the artifacts of the assets that leave rows out, as far as they are made."""
    made: list[Artifact] = []
    for asset in (
        *LEAVING,
        *(OF_TEXT if project.data.text else ()),
        *(OWN if project.data.rehearsal_self else ()),
    ):
        try:
            artifact = store.current(asset, None if asset.startswith("raw_") else name)
        except (ArtifactError, OSError, ValueError):
            continue  # its own line tells why
        if artifact is not None:
            made.append(artifact)
    return made


def left_out_counts(
    project: Project, store: ArtifactStore, names: Iterable[str]
) -> dict[str, dict[str, int]]:
    """Return {base model: {reason: rows that are left out}}."""
    return {name: counted([one.metrics for one in _made(project, store, name)]) for name in names}


def left_out_lines(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line for each base model of which rows are left out."""
    return [
        f"left out of {name}: "
        + ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        + " (ft status --left-out lists them)"
        for name, reasons in counts.items()
        if reasons
    ]


def sources(store: ArtifactStore, name: str) -> list[SourceLine]:
    """Return what became of the sources in the current split; [] if it cannot be read."""
    try:
        split = store.current("heldout_split", name)
        return read_sources(split.path) if split else []
    except (ArtifactError, OSError, ValueError):
        return []  # its own line tells why


def source_lines(title: str, lines: Sequence[SourceLine]) -> list[str]:
    """Return what each source gives to the train side, as a table of text."""
    if len(lines) < 2 and not any(line.portion != "all" for line in lines):
        return []
    total = sum(line.trained_tokens for line in lines) or 1
    rows = [
        [
            f"  {source_name(line.key, line.path)}",
            line.portion,
            f"{line.trained:,}",
            f"{line.trained_tokens:,}",
            f"{line.trained_tokens / total:.1%}",
        ]
        for line in lines
    ]
    header = [title, "taken", "rows", "tokens", "share"]
    return ["", *columns([header, *rows])]


def left_out(project: Project) -> dict[str, list[LeftOutRow]]:
    """Return all rows that are left out, by base model, with the reason and the twin of each."""
    store = open_store(project)
    return {
        name: list(left_out_rows({one.asset: one.path for one in _made(project, store, name)}))
        for name in project.base_models
    }


def _line(store: ArtifactStore, asset: str, partition: str | None) -> Line:
    try:
        artifact = store.current(asset, partition)
    except (ArtifactError, OSError, ValueError) as error:
        reason = f"{error.found}; {error.fix}" if isinstance(error, ArtifactError) else str(error)
        return Line(asset=asset, partition=partition, problem=f"cannot be read: {reason}")
    if artifact is None:
        return Line(asset=asset, partition=partition)
    return Line(
        asset=asset,
        partition=partition,
        fingerprint=artifact.fingerprint,
        made=artifact.manifest.finished,
        seconds=round(artifact.manifest.seconds, 1),
        key=key_number(artifact),
    )


def table(shown: Status) -> str:
    """Return the status as text."""
    groups = {"all base models": shown.unpartitioned, **shown.base_models}
    rows = [
        [
            name,
            line.asset,
            (line.fingerprint or NOT_MADE)[:8],
            NOT_MADE if line.made is None else in_utc(line.made),
            _said(line),
        ]
        for name, lines in groups.items()
        for line in lines
    ]
    lines, before = list[str](), None
    for (name, *_), text in zip(
        rows,
        columns([["asset", "version", "made (UTC)", ""], *[row[1:] for row in rows]])[1:],
        strict=True,
    ):
        if name != before:
            lines += ["", name] if before else [name]
            before = name
        lines.append(f"  {text}")
    for name, found in shown.sources.items():
        lines += source_lines(f"trained by {name}", found)
    for line in left_out_lines(shown.left_out):
        lines += ["", line]
    lines += [
        "",
        f"store: {shown.store}, {in_bytes(shown.bytes)} in {shown.versions} versions, "
        f"{in_bytes(shown.free_bytes)} free",
    ]
    if shown.elsewhere:
        lines.append(
            f"also there, of no asset or base model of finetune.yaml: {', '.join(shown.elsewhere)}"
        )
    lines.append("times are UTC; ft plan shows what is out of date, ft gc removes old versions")
    return "\n".join(lines)


def _said(line: Line) -> str:
    return line.problem or line.key or ("" if line.made is not None else "not made yet")


def key_number(artifact: Artifact) -> str:
    """Return the summary that an artifact's asset declares.

    For an asset without a summary, or metrics of an older version, return the first two metrics.
    """
    try:
        return _summaries()[artifact.asset](artifact.metrics)
    except (KeyError, TypeError, ValueError):
        known = [
            (name, value)
            for name, value in artifact.metrics.items()
            if isinstance(value, int | float | str) and value != ""
        ]
        return ", ".join(f"{name} {value}" for name, value in known[:2])


@functools.cache
def _summaries() -> dict[str, Summary]:
    return {asset.name: asset.summary for asset in declared().assets if asset.summary}
