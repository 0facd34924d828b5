"""`what_would_run`: the plan of `ft plan` as a job, for the UI.

It is not an asset. In the lineage an asset would look like a step to a model, and would be out of
date at once.
"""

from collections.abc import Sequence

import dagster as dg
from pydantic import Field

from ft_assets.config import Project
from ft_assets.orchestration.run_plan import RUNS, Build, PlannedStep, Plans, memory_of, summary


class Chosen(dg.Config):
    """The base models that a job is about."""

    base_models: list[str] = Field(
        default=[], description="Keys of base_models in finetune.yaml; empty: all of them."
    )

    def names(self, project: Project) -> list[str]:
        """Return the chosen base models. Raises ConfigError for one that the project lacks."""
        for name in self.base_models:
            project.base_model(name)
        return self.base_models or list(project.base_models)


def markdown(steps: Sequence[PlannedStep]) -> str:
    """Format a plan as a Markdown table: action, last time, memory (≈ predicted), reason."""
    lines = ["| asset | | last time | memory | why |", "|---|---|---:|---:|---|"]
    for step in steps:
        action = f"**{step.action}**" if step.action == RUNS else step.action
        took = "–" if step.seconds is None else f"{step.seconds:.0f} s"
        memory = memory_of(step) or "–"
        why = "<br>".join(step.why).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {step.asset} | {action} | {took} | {memory} | {why} |")
    return "\n".join(lines)


def what_would_run(project: Project, build: Build) -> dg.JobDefinition:
    """Build the job. Its op fails for a base model that is not in finetune.yaml."""

    @dg.op(
        name=project.place.name("plan"),
        description="Compares each step's inputs, settings and code with the store. Makes nothing.",
    )
    def plan_op(context: dg.OpExecutionContext, config: Chosen) -> None:
        plans = Plans(project, build)
        keys = list(plans.graph.materializable_asset_keys)
        for name in config.names(project):
            steps = plans.of(keys, name)
            context.log.info(f"{name}: {summary(steps)}")
            context.log_event(
                dg.ExpectationResult(
                    success=True,
                    label=f"{name}: {summary(steps)}",
                    metadata={"plan": dg.MetadataValue.md(markdown(steps))},
                )
            )

    @dg.job(
        name=project.place.name("what_would_run"),
        description="Shows what a run would do, why, how long it takes and how much memory it "
        "needs. Makes nothing. The same as ft plan.",
    )
    def what_would_run() -> None:
        plan_op()

    return what_would_run
