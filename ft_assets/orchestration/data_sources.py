"""The data sources of finetune.yaml as roots of the graph: one external asset a key of `data`.

A change of one source makes only the assets below that source out of date.
"""

import hashlib
import json
from collections.abc import Sequence

import dagster as dg

from ft_assets.artifacts import file_sha256
from ft_assets.artifacts.content_hashes import ContentHashes
from ft_assets.config import Project
from ft_assets.config.data import ASSET
from ft_assets.data.content import KEYS as DATA_KEYS
from ft_assets.data.content import Sha256, data_content
from ft_assets.errors import FtError, InfrastructureFault
from ft_assets.orchestration.place import key_of
from ft_assets.review.judgements import Judgements

TABLES = "upstream_tables"  # the asset that keeps the tables of `data.train: {asset: …}`
REVIEW = "review"  # the judgements of people, which are no key of `data`
KEYS = (*DATA_KEYS, REVIEW)
# Written by the one who reports a version, so that the next report can compare.
Versions = dict[str, str]


def source_asset(key: str) -> str:
    """Return the name of the asset that stands for the files of a key of `data`."""
    return f"{key}_files"


def sources_of(project: Project, keys: Sequence[str] = KEYS) -> list[str]:
    """Return the keys for which the project names files."""
    return [
        key
        for key in keys
        if (project.review is not None if key == REVIEW else getattr(project.data, key))
    ]


def upstream_assets(project: Project, keys: Sequence[str] = DATA_KEYS) -> list[str]:
    """Return the keys of the assets whose tables these keys of `data` read."""
    paths = [path for key in keys if key in DATA_KEYS for path in project.data.paths(key)]
    found = (path for path in paths if path.startswith(ASSET))
    return sorted({path.removeprefix(ASSET) for path in found})


def source_specs(project: Project, owner: str) -> list[dg.AssetSpec]:
    """Return one external asset for each data source of the project."""
    return [
        dg.AssetSpec(
            key_of(project, source_asset(key)),
            description=f"The files that finetune.yaml names under `{_named(key)}`. Each run of "
            "`ft run`, and the sensor `mark_stale`, reports a new version when their "
            "content changed.",
            group_name=project.place.group or "data",
            owners=[owner],
            kinds={"file"},
            deps=[key_of(project, TABLES)] if upstream_assets(project, [key]) else [],
        )
        for key in sources_of(project)
    ]


def source_versions(project: Project, sha256: Sha256 = file_sha256) -> Versions:
    """Return the version of each source: a hash of its content, independent of names and order.

    Raises DataError or InfrastructureFault if a file cannot be read.
    """
    keys = sources_of(project)
    found = {
        key: _hash(sorted(digest for _, digest in files))
        for key, files in data_content(
            project, [key for key in keys if key != REVIEW], sha256
        ).items()
    }
    if project.review is not None:
        found[REVIEW] = Judgements(project.path(project.review.folder)).version()
    return found


def _named(key: str) -> str:
    return "review.folder" if key == REVIEW else f"data.{key}"


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


def reports(project: Project, now: Versions, before: Versions) -> list[dg.AssetMaterialization]:
    """Return an event for each source whose version is not that of `before`.

    Each is a materialization, not an observation: after an observation of an external asset
    without a function, Dagster shows the assets below it as out of date for ever.
    """
    return [
        dg.AssetMaterialization(
            key_of(project, source_asset(key)), tags={"dagster/data_version": version}
        )
        for key, version in now.items()
        if before.get(key) != version
    ]


def reported(instance: dg.DagsterInstance, project: Project) -> Versions:
    """Return the versions that were reported last, by anyone."""
    found = Versions()
    for key in sources_of(project):
        event = instance.get_latest_materialization_event(key_of(project, source_asset(key)))
        materialization = event.asset_materialization if event else None
        if materialization and materialization.tags:
            found[key] = materialization.tags["dagster/data_version"]
    return found


def report_sources(instance: dg.DagsterInstance, project: Project) -> None:
    """Report the sources that changed since the last report.

    A run does so before it starts: otherwise its assets would read as older than the first report.
    A source that cannot be read is left to the asset that reads it, which names it.
    """
    try:
        now = source_versions(project, ContentHashes(project.root / ".ft" / "hashes.json").of)
    except (FtError, InfrastructureFault):
        return
    for event in reports(project, now, reported(instance, project)):
        instance.report_runless_asset_event(event)
