"""Step: resolve a base model's source to a bf16 snapshot."""

import json
from pathlib import Path

from ft_assets.config import BaseModelSettings, ChatSettings
from ft_assets.job import Job, Report, StepResult
from ft_assets.models.license import stated_license
from ft_assets.models.source import write_snapshot
from ft_assets.step_runner import main


def step(job: Job, report: Report) -> StepResult:
    settings = BaseModelSettings.model_validate(job.settings["model"])
    chat = ChatSettings.model_validate(job.settings.get("chat", {}))
    name, root, identity = job.partition or "", Path(job.settings["root"]), job.settings["identity"]
    report("reading the base model")
    facts = write_snapshot(
        name, settings, root, identity, job.settings["template"], job.output, chat
    )
    info = (
        job.output / "info"
    )  # no part of the content: a licence that is stated elsewhere retrains nothing
    info.mkdir(exist_ok=True)
    (info / "license.json").write_text(
        json.dumps(stated_license(name, settings, root, identity), indent=1)
    )
    return StepResult(facts)


if __name__ == "__main__":
    main(step)
