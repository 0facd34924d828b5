"""The asset `upstream_tables`: the tables of other people's assets, kept by content."""

import shutil
import tempfile
from pathlib import Path

import dagster as dg

from ft_assets.artifacts import file_sha256
from ft_assets.data.upstream import folder_of, point_to
from ft_assets.errors import DataError
from ft_assets.job import StepResult
from ft_assets.markdown import table
from ft_assets.orchestration.data_sources import upstream_assets
from ft_assets.orchestration.declarations import asset
from ft_assets.orchestration.materializer import Materializer, result
from ft_assets.orchestration.upstream import can_be_loaded, load_tables


@asset(
    group="data",
    kinds=["parquet"],
    code_version="1",
    per_base_model=False,
    only_if=lambda project: bool(upstream_assets(project)),
    outside=upstream_assets,
    summary=lambda metrics: f"{metrics['files']} files of {metrics['assets']} assets",
)
def upstream_tables(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The tables of the assets that finetune.yaml names as data, as files.

    A run reads them again and keeps them by content: a table with the same rows changes nothing
    below. Where the assets cannot be loaded, such as under `ft run`, the version that was read
    last is kept.
    """
    project, store = materializer.project, materializer.store
    assets = upstream_assets(project)
    current = store.current("upstream_tables", None)
    known = current is not None and {*assets} <= {*current.manifest.settings["tables"]}
    if materializer.plans or not any(can_be_loaded(context, asset) for asset in assets):
        if current is None or not known:
            raise DataError(
                where=f"finetune.yaml: {{asset: {assets[0]}}}",
                found="cannot be read here, and was not read before",
                expected="a run in the code location that has the asset",
                fix="materialize upstream_tables there (docs/dagster.md)",
            )
        kept, reused = materializer.keep(context, current, (), "read in another code location")
        point_to(project.root, kept.path)
        return result(kept, reused)
    with tempfile.TemporaryDirectory(prefix="ft-upstream-") as scratch:
        tables = Path(scratch) / "tables"
        found = load_tables(context, assets, tables)
        files = {
            asset: {name: file_sha256(tables / folder_of(asset) / name) for name in names}
            for asset, names in found.items()
        }
        artifact, reused = materializer.materialize(
            context,
            identity={"tables": files},
            make=lambda output: _keep(tables, output, found),
        )
    point_to(project.root, artifact.path)
    rows = [[asset, name, sha[:8]] for asset, named in files.items() for name, sha in named.items()]
    shown = dg.MetadataValue.md(table(["asset", "file", "sha256"], rows))
    return result(artifact, reused, tables=shown)


def _keep(tables: Path, output: Path, found: dict[str, list[str]]) -> StepResult:
    shutil.copytree(tables, output, dirs_exist_ok=True)
    return StepResult({"assets": len(found), "files": sum(map(len, found.values()))})
