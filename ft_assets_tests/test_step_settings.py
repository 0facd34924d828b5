"""The settings of a step: one typed model a step, validated before anything heavy is loaded."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ft_assets import steps
from ft_assets.errors import JobError
from ft_assets.evaluation.report_model import Verdict
from ft_assets.job import Job, Step, StepSettings
from ft_assets.step_runner import execute

STEPS = sorted({module.name for module in pkgutil.iter_modules(steps.__path__)} - {"preload"})


def job(folder: Path, step: str, settings: dict[str, Any]) -> Job:
    (folder / "work").mkdir()
    return Job(
        step=step,
        asset="test",
        partition="tiny",
        fingerprint="0",
        settings=settings,
        inputs={},
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        work=folder / "work",
    )


def by_hand(step: str, file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"ft_assets.steps.{step}", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", STEPS)
def test_every_step_declares_its_settings_under_its_own_name(name: str) -> None:
    module = importlib.import_module(f"ft_assets.steps.{name}")
    assert issubclass(module.Settings, StepSettings)
    assert module.Settings.STEP.name == name


@pytest.mark.parametrize("name", STEPS)
def test_settings_of_another_step_are_refused_before_the_step_begins(
    name: str, tmp_path: Path
) -> None:
    step = importlib.import_module(f"ft_assets.steps.{name}").step
    given = job(tmp_path, name, {"nothing": 1})
    with pytest.raises(JobError, match=f"settings of the step {name}"):
        step(given, lambda *_, **__: None)


def test_misspelt_setting_is_named_in_the_work_folder(tmp_path: Path) -> None:
    step = importlib.import_module("ft_assets.steps.push").step
    given = job(tmp_path, "push", {"repo": "a/b", "private": True, "privat": True})
    assert execute(step, given, lambda *_, **__: None) == 2
    error = json.loads(given.error_file.read_text())
    assert error["kind"] == "JobError"
    assert error["found"].startswith("privat: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Invalid JSON"),
        ('{"step": "sft"}', "asset: Field required"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_file_that_is_not_a_job_ends_in_a_sentence(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    file = tmp_path / "job.json"
    if text is not None:
        file.write_text(text)
    done = by_hand("sft", file)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_job_with_a_wrong_setting_ends_in_a_sentence(tmp_path: Path) -> None:
    given = job(tmp_path, "sft", {"lora": {"r": "sixteen"}, "sft": {}})
    file = tmp_path / "job.json"
    file.write_text(given.model_dump_json())
    done = by_hand("sft", file)
    assert done.returncode == 2
    assert "settings of the step sft: lora.r: " in done.stderr
    assert "Traceback" not in done.stderr


def test_verdict_keeps_its_layout_on_the_way_through_a_job_file(tmp_path: Path) -> None:
    class Judging(StepSettings):
        STEP: ClassVar = Step("judging")

        verdict: Verdict

    verdict = Verdict(
        status="PASS",
        candidate="sft",
        reported_candidate="sft",
        reasons=["exact +0.5"],
        dpo=None,
        candidates={},
        bound_to={},
    )
    given = job(tmp_path, "judging", Judging(verdict=verdict).to_json_dict())
    read = Judging.of(Job.model_validate_json(given.model_dump_json())).verdict
    assert read == verdict
    assert read.to_json() == verdict.to_json()
    assert "override" not in read.to_dict()
