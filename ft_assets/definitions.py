"""The code location: assets, checks, automation and resources of the project that finetune.yaml describes."""

import warnings

import dagster as dg

warnings.filterwarnings("ignore", category=dg.PreviewWarning)  # partitioned asset checks
warnings.filterwarnings("ignore", category=dg.BetaWarning)

from ft_assets.assets import raw_data as data  # noqa: E402
from ft_assets.assets.dataset import dataset_assets  # noqa: E402
from ft_assets.assets.eval_report import evaluation_assets  # noqa: E402
from ft_assets.assets.export import export_assets  # noqa: E402
from ft_assets.assets.hub_model import hub_assets  # noqa: E402
from ft_assets.assets.leaderboard import leaderboard_asset  # noqa: E402
from ft_assets.assets.merged_model import release_assets  # noqa: E402
from ft_assets.assets.release import champion_assets  # noqa: E402
from ft_assets.assets.training import training_assets  # noqa: E402
from ft_assets.config import Project, load_project  # noqa: E402
from ft_assets.orchestration.automation import automation, freshness  # noqa: E402
from ft_assets.orchestration.console import console  # noqa: E402
from ft_assets.orchestration.materializer import Materializer  # noqa: E402
from ft_assets.orchestration.rerun_stale import rerun_stale  # noqa: E402
from ft_assets.orchestration.run_plan_job import what_would_run  # noqa: E402


def build(project: Project) -> dg.Definitions:
    """Return the definitions of a project: one partition a base model."""
    base_models = dg.StaticPartitionsDefinition(list(project.base_models))
    prepared, prepared_checks = dataset_assets(base_models)
    trained, trained_checks = training_assets(base_models)
    judged, judged_checks = evaluation_assets(base_models)
    merged, merged_checks = release_assets(base_models)
    released, released_checks = champion_assets(base_models)
    exported, exported_checks = export_assets(base_models)
    schedules, sensors, jobs = automation(project, base_models)
    sensors.append(rerun_stale(project, build, jobs[0]))
    jobs.append(what_would_run(project, build))
    definitions = dg.Definitions(
        assets=[
            *data.ASSETS,
            *prepared,
            *trained,
            *judged,
            *merged,
            *released,
            *exported,
            *hub_assets(base_models, project.release.push),
            leaderboard_asset(),
        ],
        asset_checks=[
            *data.CHECKS,
            *prepared_checks,
            *trained_checks,
            *judged_checks,
            *merged_checks,
            *released_checks,
            *exported_checks,
        ],
        jobs=jobs,
        schedules=schedules,
        sensors=sensors,
        resources={"materializer": Materializer(project)},
        loggers={"console": console},
        # Every heavy step is a child process of the launcher already: a process a step more would only cost time.
        executor=dg.in_process_executor,
    )
    return definitions.map_asset_specs(
        func=lambda spec: spec.replace_attributes(
            freshness_policy=freshness(project.freshness, spec.key)
        )
    )


defs = build(load_project())
