"""Step: resolve a base model's source to a bf16 snapshot."""

import json
from pathlib import Path
from typing import ClassVar

from ft_assets.config import BaseModelSettings, ChatSettings, LoraSettings
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.models.license import LICENSE_FILE, stated_license
from ft_assets.models.snapshot import write_snapshot
from ft_assets.models.source import SourceIdentity
from ft_assets.step_runner import main, takes


class Settings(StepSettings):
    """`identity` and `template` are those that the artifact was fingerprinted by.

    lora: the adapter that is tried. It does not change the artifact.
    """

    STEP: ClassVar = Step("base_model")

    model: BaseModelSettings
    chat: ChatSettings = ChatSettings()
    root: Path
    identity: SourceIdentity
    template: str | None
    lora: LoraSettings = LoraSettings()


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    name = job.partition or ""
    report("reading the base model")
    facts = write_snapshot(
        name,
        settings.model,
        settings.root,
        settings.identity,
        settings.template,
        job.output,
        settings.chat,
    )
    from ft_assets.training.dry_run import try_base

    report("trying a training step and an answer")
    if failed := try_base(f"base_models.{name}", job.output, settings.lora):
        report(failed)
    # Below info/, which is not part of the content: a change of the licence text retrains nothing.
    path = job.output / LICENSE_FILE
    path.parent.mkdir(exist_ok=True)
    commit = settings.identity.get("commit")
    license_ = stated_license(name, settings.model, settings.root, commit)
    path.write_text(json.dumps(license_.model_dump(mode="json"), indent=1))
    return StepResult({**facts})


if __name__ == "__main__":
    main(step)
