"""`bring_up_to_date`: the job that runs what is out of date, for one base model or for all.

A run of the job plans as `ft plan` does and names the stale steps of each base model in a tag. The
sensor beside it requests these runs: an op cannot start runs of other jobs.
"""

import json
from collections.abc import Iterator
from typing import Any

import dagster as dg

from ft_assets.config import Project
from ft_assets.orchestration.instance import require_kept
from ft_assets.orchestration.materializer import user_errors
from ft_assets.orchestration.run_plan import Build, summary
from ft_assets.orchestration.run_plan_job import Chosen
from ft_assets.orchestration.stale_graph import StaleGraph

NAME = "bring_up_to_date"
STEPS = ".dagster/ft_steps"  # {base model: its stale steps}; the UI hides tags with this prefix


def bring_up_to_date(
    project: Project, build: Build, job: Any
) -> tuple[dg.JobDefinition, dg.SensorDefinition]:
    """Build the job, and the sensor that requests runs of `job`, which has every asset.

    The job's op fails for a base model that is not in finetune.yaml.
    """

    @dg.op(
        name=project.place.name("find_stale"),
        description="Finds what is out of date. Its runs start within half a minute.",
    )
    def find_stale(context: dg.OpExecutionContext, config: Chosen) -> None:
        with user_errors(project):
            require_kept(context.instance, project)
        graph = StaleGraph.today(project, build)
        found = dict[str, list[str]]()
        for name in config.names(graph.project):
            steps, refused = graph.stale(graph.graph.materializable_asset_keys, name)
            context.log.info(f"{name}: {summary(steps) if steps else 'nothing to do'}")
            for asset, reason in refused.items():
                context.log.warning(f"{name}: {asset}: {reason}")
            if steps:
                found[name] = [step.asset for step in steps]
        context.instance.add_run_tags(context.run_id, {STEPS: json.dumps(found)})

    @dg.job(
        name=project.place.name(NAME),
        description="Runs what is out of date, and only that: one run for each base model. "
        "Materialize, without a config, does it for all of them.",
    )
    def update() -> None:
        find_stale()

    @dg.run_status_sensor(
        name=project.place.name(f"{NAME}_runs"),
        run_status=dg.DagsterRunStatus.SUCCESS,
        monitored_jobs=[update],
        request_job=job,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Requests the runs that a run of {NAME} has planned.",
    )
    def sensor(context: dg.RunStatusSensorContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        run = context.dagster_run
        found: dict[str, list[str]] = json.loads(run.tags.get(STEPS, "{}"))
        if not found:
            yield dg.SkipReason("nothing is out of date")
            return
        graph = StaleGraph.today(project, build)
        for name, assets in found.items():
            key = f"{run.run_id}-{name}"
            yield graph.request(assets, name, {"ft/started_by": NAME}, run_key=key)

    return update, sensor
