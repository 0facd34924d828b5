"""Step: resolve a base model's source to a bf16 snapshot."""

import json
from pathlib import Path

from ft_assets.config import BaseModelSettings, ChatSettings
from ft_assets.job import Job, Report, StepResult
from ft_assets.models.license import LICENSE_FILE, stated_license
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
    # Below info/, which is not part of the content: a change of the licence text retrains nothing.
    path = job.output / LICENSE_FILE
    path.parent.mkdir(exist_ok=True)
    license_ = stated_license(name, settings, root, identity.get("commit"))
    path.write_text(json.dumps(license_.model_dump(mode="json"), indent=1))
    return StepResult(facts)


if __name__ == "__main__":
    main(step)
