"""`what_would_run`: the plan of `ft plan` for those who live in the UI, as a job of its own.

A job and not an asset: a box in the lineage would look like a step of the way to a model, and would be out of date at once.
"""

from collections.abc import Sequence

import dagster as dg
from pydantic import Field

from ft_assets.config import Project
from ft_assets.orchestration.run_plan import RUNS, Build, Step, memory_of, plan


class PlanConfig(dg.Config):
    """What to look at."""

    base_models: list[str] = Field(
        default=[], description="Keys of base_models in finetune.yaml; empty: all of them."
    )


def markdown(steps: Sequence[Step]) -> str:
    """Return a plan as a table: what happens to each asset, why, how long it took the last time and how much memory
    it used, or by the memory plan will (≈)."""
    lines = ["| asset | | last time | memory | why |", "|---|---|---:|---:|---|"]
    for step in steps:
        action = f"**{step.action}**" if step.action == RUNS else step.action
        took = "–" if step.seconds is None else f"{step.seconds:.0f} s"
        memory = memory_of(step) or "–"
        why = "<br>".join(step.why).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {step.asset} | {action} | {took} | {memory} | {why} |")
    return "\n".join(lines)


def what_would_run(project: Project, build: Build) -> dg.JobDefinition:
    """Return the job. It makes nothing; its op fails for a base model that is not in finetune.yaml."""

    @dg.op(
        name="plan",
        description="Compares every step's inputs, settings and code with what was made; makes nothing.",
    )
    def plan_op(context: dg.OpExecutionContext, config: PlanConfig) -> None:
        for name in config.base_models:
            project.base_model(name)
        keys = list(build(project).resolve_asset_graph().materializable_asset_keys)
        for name in config.base_models or list(project.base_models):
            steps = plan(project, build, keys, name)
            runs = sum(step.action == RUNS for step in steps)
            context.log.info(f"{name}: {runs} of {len(steps)} steps would run")
            context.log_event(
                dg.ExpectationResult(
                    success=True,
                    label=f"{name}: {runs} steps",
                    metadata={"plan": dg.MetadataValue.md(markdown(steps))},
                )
            )

    @dg.job(
        description="What would a run do, why, how long and with how much memory? Makes nothing; the same as ft plan."
    )
    def what_would_run() -> None:
        plan_op()

    return what_would_run
