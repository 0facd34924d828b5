"""Faults of the infrastructure are retried as often as `launcher.retries` says.

A step's own failure, a user's error and a verdict are not. The launcher here starts no process:
it raises what the real ones raise. Their own tests cause these faults in real processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from ft_assets.artifacts import ArtifactStore
from ft_assets.assets import raw_rows
from ft_assets.config import load_project
from ft_assets.errors import (
    ConfigError,
    DataError,
    InfrastructureFault,
    StepFailed,
    StepLost,
    StoreUnreachable,
)
from ft_assets.job import Job, StepResult
from ft_assets.launchers.base import failed
from ft_assets_tests.factories import edit, ft
from ft_assets_tests.pipeline import InProcessLauncher, checks, failure, materialize

LOST = StepLost("base_model", -9, "Killed")
ELSE = StepFailed("base_model", 1, "Traceback")


class Failing(InProcessLauncher):
    """Raises what it is given, one a try, then runs the step."""

    def __init__(self, *errors: Exception) -> None:
        self.errors: Iterator[Exception] = iter(errors)
        self.tries = 0

    def run(self, job: Job, on_progress: Any) -> StepResult:
        self.tries += 1
        for error in self.errors:
            raise error
        return super().run(job, on_progress)


def base_model(folder: Path, launcher: Failing) -> dg.ExecuteInProcessResult:
    """Materialize base_model of a project that waits no time between tries."""
    from ft_assets.definitions import build

    settings = yaml.safe_load((folder / "finetune.yaml").read_text())
    (folder / "finetune.yaml").write_text(
        yaml.safe_dump(
            {**settings, "launcher": {"kind": "local", "retries": 2, "retry_seconds": 0}}
        )
    )
    definitions = build(load_project(folder / "finetune.yaml"))
    resources: Any = definitions.resources
    resources["materializer"].launcher = launcher
    with dg.DagsterInstance.ephemeral() as instance:
        return definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            partition_key="tiny",
            asset_selection=[dg.AssetKey("base_model")],
            raise_on_error=False,
            run_config={"loggers": {"console": {}}},
        )


@pytest.mark.parametrize("fault", [LOST, StoreUnreachable("s3://models", "timeout")])
def test_fault_of_the_infrastructure_is_tried_again(project: Path, fault: Exception) -> None:
    launcher = Failing(fault, fault)
    result = base_model(project, launcher)
    assert result.success, failure(result)
    assert launcher.tries == 3


@pytest.mark.parametrize("reader", ["the check", "the pictures"])
def test_store_that_does_not_answer_a_reader_is_asked_again(
    project: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    faults = iter([StoreUnreachable("s3://models", "timeout")] * 2)
    name, module = ("need", ArtifactStore) if reader == "the check" else ("_rejected", raw_rows)
    real: Any = getattr(module, name)

    def unsteady(*given: Any) -> Any:
        for fault in faults:
            raise fault
        return real(*given)

    monkeypatch.setattr(module, name, unsteady)
    edit(project, launcher={"kind": "local", "retries": 2, "retry_seconds": 0})
    result = materialize(project, "raw_dataset")
    assert result.success, failure(result)
    assert next(faults, None) is None
    assert checks(result)["rows_are_valid"].passed


def test_ft_says_of_a_store_that_does_not_answer_that_it_may_be_tried_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    edit(project, store="s3://models/store")
    done = ft(project, "report")
    assert done.returncode == 75
    assert "the store does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 5, done.stderr


def test_fault_that_stays_is_told_after_the_last_try(project: Path) -> None:
    launcher = Failing(LOST, LOST, LOST, LOST)
    result = base_model(project, launcher)
    assert not result.success
    assert launcher.tries == 3
    assert "killed by signal 9" in failure(result)


@pytest.mark.parametrize(
    "error", [ELSE, DataError(where="row 3", found="no answer"), KeyError("unexpected")]
)
def test_step_that_fails_by_itself_is_tried_once(project: Path, error: Exception) -> None:
    launcher = Failing(error)
    assert str(error) in failure(base_model(project, launcher))
    assert launcher.tries == 1


@pytest.mark.parametrize(
    ("code", "tail", "lost"),
    [
        (-9, "", True),  # the OOM killer
        (137, "", True),  # the same, as a container's runtime says it
        (143, "", True),  # a node that shuts down
        (InfrastructureFault.exit_code, "", True),
        (1, "RuntimeError: CUDA error: uncorrectable ECC error encountered", True),
        (1, "torch.OutOfMemoryError: CUDA out of memory", False),
        (-11, "", False),  # a crash of its own: it would crash again
        (-6, "", False),
        (1, "ValueError", False),
    ],
)
def test_what_counts_as_a_fault_of_the_infrastructure(code: int, tail: str, lost: bool) -> None:
    assert isinstance(failed("sft", code, tail), StepLost) is lost


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ("raj", r"launcher.kind: 'raj'[\s\S]*local, accelerate, ray[\s\S]*did you mean 'ray'"),
        (
            {"kind": "ray", "worker": 2},
            r"launcher.worker: is not a known key[\s\S]*did you mean 'workers'",
        ),
        ({"kind": "accelerate", "processes": 0}, r"launcher.processes: 0"),
        ({"workers": 2}, r"launcher.kind: 'no kind'"),
    ],
)
def test_launcher_that_cannot_be_is_told_with_its_key(
    project: Path, launcher: Any, said: str
) -> None:
    settings = yaml.safe_load((project / "finetune.yaml").read_text())
    (project / "finetune.yaml").write_text(yaml.safe_dump({**settings, "launcher": launcher}))
    with pytest.raises(ConfigError, match=said):
        load_project(project / "finetune.yaml")


def test_launcher_by_its_name_alone_has_its_defaults(project: Path) -> None:
    settings = yaml.safe_load((project / "finetune.yaml").read_text())
    (project / "finetune.yaml").write_text(yaml.safe_dump({**settings, "launcher": "ray"}))
    assert load_project(project / "finetune.yaml").launcher.model_dump(
        include={"kind", "address", "retries"}
    ) == {
        "kind": "ray",
        "address": "auto",
        "retries": 2,
    }
