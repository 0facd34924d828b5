"""Step: push the champion to the hub."""

import json
from typing import ClassVar

from ft_assets.artifacts import Artifact
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.release.push import push
from ft_assets.release.statements import MODEL_SIGNATURE
from ft_assets.step_runner import main, takes


class Settings(StepSettings):
    STEP: ClassVar = Step("push")

    repo: str
    private: bool


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    folder = job.inputs["champion"]
    model = Artifact.read(folder)
    repo, private = settings.repo, settings.private
    files = {name: folder / name for name in model.manifest.files}
    signature = job.inputs["release"] / MODEL_SIGNATURE
    if signature.is_file():
        files[MODEL_SIGNATURE] = signature
    commit = push(files, repo, private, f"merged_model {model.fingerprint}")
    report("pushed", repo=repo, commit=commit)
    (job.output / "push.json").write_text(
        json.dumps({"repo": repo, "private": private, "commit": commit}, indent=1)
    )
    return StepResult(
        {
            "repo": repo,
            "private": private,
            "commit": commit,
            "merged_model": model.fingerprint,
        }
    )


if __name__ == "__main__":
    main(step)
