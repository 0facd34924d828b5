"""Step: resolve a base model's source to a bf16 snapshot."""

from pathlib import Path

from ft_assets.config import BaseModelSettings, ChatSettings
from ft_assets.job import Job, Report, StepResult
from ft_assets.models.source import write_snapshot
from ft_assets.steps._run import main


def step(job: Job, report: Report) -> StepResult:
    settings = BaseModelSettings.model_validate(job.settings["model"])
    chat = ChatSettings.model_validate(job.settings.get("chat", {}))
    report("reading the base model")
    facts = write_snapshot(
        job.partition or "", settings, Path(job.settings["root"]), job.settings["identity"], job.settings["template"], job.output, chat
    )
    return StepResult(facts)


if __name__ == "__main__":
    main(step)
