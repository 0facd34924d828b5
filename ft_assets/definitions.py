"""The code location: assets, checks, automation and resources of a project."""

import warnings
from typing import Any

import dagster as dg

warnings.filterwarnings("ignore", category=dg.PreviewWarning)  # partitioned asset checks
warnings.filterwarnings("ignore", category=dg.BetaWarning)

from ft_assets.assets import declared  # noqa: E402
from ft_assets.compat.dagster import keep_history_clean  # noqa: E402
from ft_assets.compat.dagster_at_rest import (  # noqa: E402
    rest_as_code_server,
    sleep_while_a_pool_is_full,
)
from ft_assets.config import Project, load_project  # noqa: E402
from ft_assets.orchestration.approval_reminder import approval_reminder  # noqa: E402
from ft_assets.orchestration.approve_release import approve_release  # noqa: E402
from ft_assets.orchestration.automation import automation, freshness  # noqa: E402
from ft_assets.orchestration.bring_up_to_date import bring_up_to_date  # noqa: E402
from ft_assets.orchestration.console import console  # noqa: E402
from ft_assets.orchestration.daily_check import daily_check  # noqa: E402
from ft_assets.orchestration.data_sources import source_specs  # noqa: E402
from ft_assets.orchestration.declarations import OWNER  # noqa: E402
from ft_assets.orchestration.mark_stale import mark_stale, up_to_date  # noqa: E402
from ft_assets.orchestration.materializer import StoreMaterializer  # noqa: E402
from ft_assets.orchestration.rerun_stale import rerun_stale  # noqa: E402
from ft_assets.orchestration.run_plan_job import what_would_run  # noqa: E402

# A location that a project shares keeps its own. Each heavy step is a child process of the launcher
# already: another process for each asset would only cost time.
OWN_LOCATION: Any = {"loggers": {"console": console}, "executor": dg.in_process_executor}


def build(project: Project) -> dg.Definitions:
    """Build the definitions of a project, with one partition a base model."""
    base_models = dg.StaticPartitionsDefinition(list(project.base_models))
    found = declared().of(project)
    names = [asset.name for asset in found.assets]
    schedules, sensors, jobs = automation(project, names, base_models)
    sensors += [mark_stale(project, build), rerun_stale(project, build, jobs[0])]
    update, update_runs = bring_up_to_date(project, build, jobs[0])
    sensors.append(update_runs)
    jobs += [what_would_run(project, build), update]
    if project.release.approval == "required":
        jobs.append(approve_release(project))
        sensors += approval_reminder(project)
    partitioned = [asset.name for asset in found.assets if asset.per_base_model]
    common = [asset.name for asset in found.assets if not asset.per_base_model]
    daily = daily_check(project, found.assets, base_models)
    fresh = [
        up_to_date(project, build, partitioned, base_models, "up_to_date_by_base_model"),
        up_to_date(project, build, common, None, "up_to_date"),
    ]
    definitions = dg.Definitions(
        assets=[
            *source_specs(project, OWNER),
            *(asset.bind(project, base_models) for asset in found.assets),
        ],
        asset_checks=[
            *(check.bind(project, base_models) for check in found.checks),
            *fresh,
            *daily.checks,
        ],
        jobs=[*jobs, *daily.jobs],
        schedules=[*schedules, *daily.schedules],
        sensors=sensors,
        resources={project.place.name("materializer"): StoreMaterializer(project)},
        **({} if project.place.prefix else OWN_LOCATION),
    )
    return definitions.map_asset_specs(
        func=lambda spec: spec.replace_attributes(
            freshness_policy=freshness(project.freshness, spec.key)
        )
    )


@dg.definitions
def defs() -> dg.Definitions:
    """Return the definitions of the project of $FT_CONFIG or of the current folder.

    They are read when a process loads the code location, not when it imports this module.
    """
    keep_history_clean()
    rest_as_code_server()
    sleep_while_a_pool_is_full()
    return build(load_project())
