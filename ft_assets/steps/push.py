"""Step: push the champion to the hub."""

import json

from ft_assets.artifacts import Artifact, verify_files
from ft_assets.job import Job, Report, StepResult
from ft_assets.release.push import push
from ft_assets.step_runner import main


def step(job: Job, report: Report) -> StepResult:
    folder = job.inputs["champion"]
    model = Artifact.read(folder)
    verify_files(model)
    repo, private = job.settings["push"]["repo"], job.settings["push"]["private"]
    commit = push(folder, model.manifest.files, repo, private, f"merged_model {model.fingerprint}")
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
