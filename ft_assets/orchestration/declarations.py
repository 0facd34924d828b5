"""Declare assets and asset checks at module level, before a project is known.

`@asset` and `@check` record a function. `bind` adds what every asset and check has: the place of
the project, the partitions (one a base model), the owner, and `user_errors`, which retries faults
of the infrastructure and turns a user's error into a failure of one sentence. No function can
forget one of them, and each function can be imported, called and tested alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
import pyarrow as pa

from ft_assets.artifacts import Artifact
from ft_assets.compat.dagster import TO_DO
from ft_assets.config import Project
from ft_assets.orchestration.column_schema import column_schema
from ft_assets.orchestration.data_sources import TABLES, source_asset, sources_of, upstream_assets
from ft_assets.orchestration.materializer import GPU_POOL, Materializer, user_errors
from ft_assets.orchestration.place import in_place, key_of
from ft_assets.orchestration.readable import readable

OWNER = "team:ml"
AssetBody = Callable[..., dg.MaterializeResult]
Metrics = Mapping[str, Any]  # of a manifest
Summary = Callable[[Metrics], str]


@dataclass(frozen=True, eq=False)
class Asset:
    """An asset of the graph without its partitions. Its name is that of its function.

    `sources` are the keys of `data` whose files it reads, or `review`. `summary` formats an
    artifact's metrics for `ft status`. `only_if` decides whether a project has the asset. `also`
    returns the further assets that it reads in a project, `outside` the keys of assets that are
    not the project's: when one of them changes, an automation sensor may request this asset.
    """

    body: AssetBody
    group: str
    kinds: tuple[str, ...]
    code_version: str
    deps: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    gpu: bool | Callable[[Project], bool] = False
    per_base_model: bool = True
    schema: pa.Schema | None = None
    summary: Summary | None = None
    only_if: Callable[[Project], bool] = lambda project: True
    also: Callable[[Project], Sequence[str]] = lambda project: ()
    outside: Callable[[Project], Sequence[str]] = lambda project: ()

    @property
    def name(self) -> str:
        return self.body.__name__

    def __call__(self, *arguments: Any) -> dg.MaterializeResult:
        """Call the function alone, without Dagster's wrapper."""
        return self.body(*arguments)

    def bind(self, project: Project, base_models: dg.PartitionsDefinition) -> dg.AssetsDefinition:
        """Build the Dagster asset for a project and its base models."""
        files = [source_asset(key) for key in sources_of(project, self.sources)]
        if upstream_assets(project, self.sources):
            files.append(TABLES)
        outside = [dg.AssetKey(key.split("/")) for key in self.outside(project)]
        gpu = self.gpu if isinstance(self.gpu, bool) else self.gpu(project)
        return dg.asset(
            key=key_of(project, self.name),
            partitions_def=base_models if self.per_base_model else None,
            deps=[
                *(key_of(project, name) for name in (*self.deps, *self.also(project), *files)),
                *outside,
            ],
            automation_condition=dg.AutomationCondition.eager() if outside else None,
            group_name=project.place.group or self.group,
            owners=[OWNER],
            kinds=set(self.kinds),
            code_version=self.code_version,
            pool=GPU_POOL if gpu else None,
            metadata=column_schema(self.schema) if self.schema else None,
        )(in_place(project, user_errors(project)(self.body)))


def asset(
    *,
    group: str,
    kinds: Sequence[str],
    code_version: str,
    deps: Sequence[str] = (),
    sources: Sequence[str] = (),
    gpu: bool | Callable[[Project], bool] = False,
    per_base_model: bool = True,
    schema: pa.Schema | None = None,
    summary: Summary | None = None,
    only_if: Callable[[Project], bool] = lambda project: True,
    also: Callable[[Project], Sequence[str]] = lambda project: (),
    outside: Callable[[Project], Sequence[str]] = lambda project: (),
) -> Callable[[AssetBody], Asset]:
    """Declare an asset: a function of (context, materializer) that returns `result(...)`."""

    def declare(body: AssetBody) -> Asset:
        return Asset(
            body=body,
            group=group,
            kinds=tuple(kinds),
            code_version=code_version,
            deps=tuple(deps),
            sources=tuple(sources),
            gpu=gpu,
            per_base_model=per_base_model,
            schema=schema,
            summary=summary,
            only_if=only_if,
            also=also,
            outside=outside,
        )

    return declare


@dataclass(frozen=True)
class Checked:
    """The asset that a check judges, of one base model (None if the asset has no partitions)."""

    context: dg.AssetCheckExecutionContext
    materializer: Materializer
    asset: str
    base_model: str | None

    @property
    def project(self) -> Project:
        return self.materializer.project

    @property
    def name(self) -> str:
        """The base model of a partitioned asset."""
        assert self.base_model is not None, f"{self.asset} has no partitions"
        return self.base_model

    @property
    def artifact(self) -> Artifact:
        """The current version. Raises ArtifactError if there is none, or if it is damaged."""
        store = self.materializer.store
        return store.verified(store.need(self.asset, self.base_model))

    @property
    def metrics(self) -> Metrics:
        return self.artifact.metrics


CheckBody = Callable[[Checked], dg.AssetCheckResult]


@dataclass(frozen=True, eq=False)
class Check:
    """A check of an asset without its partitions. Its name is that of its function.

    `fix` is the next step after a failure, unless the result has its own in metadata `to_do`.
    `{base}` in it is replaced by `--base NAME`.
    """

    body: CheckBody
    asset: Asset
    description: str
    blocking: bool = False
    only_if: Callable[[Project], bool] = lambda project: True
    fix: str = ""

    @property
    def name(self) -> str:
        return self.body.__name__

    def __call__(self, checked: Checked) -> dg.AssetCheckResult:
        """Call the function alone, without Dagster's wrapper."""
        return self.body(checked)

    def bind(
        self, project: Project, base_models: dg.PartitionsDefinition
    ) -> dg.AssetChecksDefinition:
        """Build the Dagster check for a project and its base models."""
        partitioned = self.asset.per_base_model

        def judge(
            context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
        ) -> dg.AssetCheckResult:
            base_model = context.partition_key if partitioned else None
            with user_errors(project):
                found = self.body(Checked(context, materializer, self.asset.name, base_model))
                return self._readable(found, base_model)

        return dg.asset_check(
            asset=key_of(project, self.asset.name),
            name=self.name,
            description=self.description,
            blocking=self.blocking,
            partitions_def=base_models if partitioned else None,
        )(in_place(project, judge))

    def _readable(self, found: dg.AssetCheckResult, base_model: str | None) -> dg.AssetCheckResult:
        """Return a result with rounded numbers and, if it failed, with the next step."""
        metadata = {name: readable(value) for name, value in found.metadata.items()}
        if not found.passed and found.severity == dg.AssetCheckSeverity.ERROR and self.fix:
            base = f"--base {base_model}" if base_model else ""
            fix = self.fix.replace("{base}", base)
            metadata = {TO_DO: dg.MetadataValue.text(fix)} | metadata
        return found._replace(metadata=metadata)


def check(
    asset: Asset,
    *,
    description: str,
    blocking: bool = False,
    only_if: Callable[[Project], bool] = lambda project: True,
    fix: str = "",
) -> Callable[[CheckBody], Check]:
    """Declare a check of `asset`: a function of a Checked that returns an AssetCheckResult."""

    def declare(body: CheckBody) -> Check:
        return Check(body, asset, description, blocking, only_if, fix)

    return declare
