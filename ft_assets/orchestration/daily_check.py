"""`verify_store`: the daily check of the store, for the UI, if finetune.yaml has `verify`.

One run checks the versions of all assets and base models, and reports the check `is_whole` of each:
200 base models do not mean 200 runs. A run that makes assets reports the check of these assets.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import dagster as dg

from ft_assets.artifacts import ArtifactStore, ObjectStore, open_store
from ft_assets.artifacts.content_hashes import FOR_EVER, ContentHashes
from ft_assets.compat.dagster import report_check
from ft_assets.config import Project
from ft_assets.orchestration.automation import AFTER_PEOPLE, valid_cron
from ft_assets.orchestration.declarations import Asset
from ft_assets.orchestration.materializer import user_errors
from ft_assets.orchestration.place import key_of, name_of
from ft_assets.release.records import label
from ft_assets.release.store_check import Finding, check_store

CHECK = "is_whole"
NAME = "verify_store"
# A disk that loses a bit leaves a file's times as they are: each file is read again once a week.
# An object store does this itself, and a download has its price.
READ_AGAIN_SECONDS = 7 * 24 * 3600.0
DESCRIPTION = (
    "Every file of every version in the store is as it was published. The job `verify_store` "
    "reports it; `ft verify` shows the same."
)


@dataclass(frozen=True)
class DailyCheck:
    """The definitions of a project with `verify`; empty without it."""

    checks: list[dg.AssetChecksDefinition]
    jobs: list[dg.JobDefinition]
    schedules: list[dg.ScheduleDefinition]


def daily_check(
    project: Project, assets: Sequence[Asset], base_models: dg.PartitionsDefinition
) -> DailyCheck:
    """Build the checks, the job and its schedule, which is on: `verify` asks for it."""
    if project.verify is None:
        return DailyCheck([], [], [])
    specs = [
        dg.AssetCheckSpec(
            CHECK,
            asset=key_of(project, asset.name),
            description=DESCRIPTION,
            partitions_def=base_models if asset.per_base_model else None,
        )
        for asset in assets
    ]
    job = _job(project, assets)
    with valid_cron("verify"):
        schedule = dg.ScheduleDefinition(
            job=job,
            cron_schedule=project.verify.cron,
            execution_timezone=project.verify.timezone,
            name=project.place.name(f"{NAME}_schedule"),
            description="Verifies the store, and reports the check is_whole of each asset.",
            tags={"ft/started_by": f"{NAME}_schedule", **AFTER_PEOPLE},
            default_status=dg.DefaultScheduleStatus.RUNNING,
        )
    return DailyCheck(
        [
            _checks(project, [one for one in specs if one.partitions_def is given], given)
            for given in (None, base_models)
        ],
        [job],
        [schedule],
    )


def _checks(
    project: Project,
    specs: Sequence[dg.AssetCheckSpec],
    base_models: dg.PartitionsDefinition | None,
) -> dg.AssetChecksDefinition:
    """Build the checks as one op, so that each can be run from its page too."""

    @dg.multi_asset_check(
        name=project.place.name(
            f"{NAME}_of_{'a_base_model' if base_models else 'all_base_models'}"
        ),
        specs=specs,
        can_subset=True,
    )
    def check(
        context: dg.AssetCheckExecutionContext,
    ) -> Iterator[dg.AssetCheckResult]:
        partition = context.partition_key if base_models else None
        with user_errors(project):
            found = by_asset(open_store(project))
        for key in sorted(context.selected_asset_check_keys):
            findings = found.get((name_of(key.asset_key), partition), [])
            yield dg.AssetCheckResult(
                asset_key=key.asset_key,
                check_name=CHECK,
                passed=not findings,
                description=described(findings),
            )

    return check


def _job(project: Project, assets: Sequence[Asset]) -> dg.JobDefinition:
    @dg.op(
        name=project.place.name("verify"),
        description="Compares the whole store with its manifests.",
    )
    def verify(context: dg.OpExecutionContext) -> None:
        with user_errors(project):
            found = by_asset(open_store(project))
        damaged = len(found)
        for asset in assets:
            for partition in project.base_models if asset.per_base_model else [None]:
                findings = found.pop((asset.name, partition), [])
                report_check(
                    context.instance,
                    context.run_id,
                    dg.AssetCheckEvaluation(
                        asset_key=key_of(project, asset.name),
                        check_name=CHECK,
                        passed=not findings,
                        description=described(findings),
                        partition=partition,
                    ),
                )
                if findings:
                    context.log.error(f"{label(asset.name, partition)}: {described(findings)}")
        for (name, partition), findings in found.items():  # of no asset of finetune.yaml
            context.log.warning(f"{label(name, partition)}: {described(findings)}")
        if damaged:  # a failed run is alerted
            raise dg.Failure(
                f"{damaged} damaged: the checks {CHECK} and the log show what heals each",
                allow_retries=False,
            )

    @dg.job(
        name=project.place.name(NAME),
        description="Compares every file of the store with its manifest, and reports the check "
        "is_whole of each asset. The same as ft verify.",
    )
    def verify_store() -> None:
        verify()

    return verify_store


def by_asset(store: ArtifactStore) -> dict[tuple[str, str | None], list[Finding]]:
    """Return the damage of a store by asset and partition."""
    max_age = FOR_EVER if isinstance(store, ObjectStore) else READ_AGAIN_SECONDS
    hashes = ContentHashes(store.kept_hashes, max_age=max_age, write_every=5.0)
    found = defaultdict[tuple[str, str | None], list[Finding]](list)
    for finding in check_store(store, hashes).findings:
        found[finding.asset, finding.partition].append(finding)
    return dict(found)


def described(findings: Sequence[Finding]) -> str:
    """Return what is damaged, what depends on it, and what heals it."""
    if not findings:
        return "every file is as it was published"
    return "\n".join(
        str(one.damage.error(one.fix))
        + (f"\n  used by:  {', '.join(one.used_by)}" if one.used_by else "")
        for one in findings
    )
