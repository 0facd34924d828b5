"""Several ranks of one machine train what one process trains, report once and end together."""

import os
import signal
from pathlib import Path

import pytest

from ft_assets.config.launcher import AccelerateSettings
from ft_assets.errors import ConfigError, StepLost
from ft_assets.launchers import LocalLauncher
from ft_assets.launchers.accelerate import AccelerateLauncher
from ft_assets_tests.launching import (
    interrupted,
    process_groups,
    require_same_training,
    trained,
    training,
    training_job,
    wait_until,
)

pytestmark = pytest.mark.graph

TWO = AccelerateLauncher(AccelerateSettings(kind="accelerate", processes=2))


@pytest.mark.parametrize("step", ["sft", "dpo"])
def test_two_ranks_train_what_one_process_trains(finished: Path, tmp_path: Path, step: str) -> None:
    alone, together = (
        training_job(finished, tmp_path / "1", step),
        training_job(finished, tmp_path / "2", step),
    )
    _, curve, metrics = trained(LocalLauncher(), alone)
    lines, _, of_two = trained(TWO, together)
    require_same_training(alone, together)
    assert len(curve) == metrics["steps"] == of_two["steps"] > 1
    steps = [line["step"] for line in lines if line["message"] == "train"]
    assert steps == sorted(set(steps))  # one voice
    assert not list(together.work.glob("rank-*"))


def test_effective_batch_that_two_ranks_cannot_share_is_refused(
    finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"sft.effective_batch: 8[\s\S]*micro_batch \(8\) x 2 ranks"
    ):
        TWO.run(training_job(finished, tmp_path, micro_batch=8), lambda _: None)


def test_rank_that_is_killed_takes_the_others_with_it(finished: Path, tmp_path: Path) -> None:
    job = training_job(finished, tmp_path, num_train_epochs=500)
    killed: list[int] = []

    def kill(line: object) -> None:
        if not killed and isinstance(line, dict) and line["message"] == "train":
            killed.extend(sorted(process_groups(job.work)))
            os.kill(killed[-1], signal.SIGKILL)

    with pytest.raises(StepLost, match="killed by signal 9"):
        TWO.run(job, kill)
    assert len(killed) == 2
    wait_until(lambda: not process_groups(job.work))


def test_interrupt_stops_all_ranks(finished: Path, tmp_path: Path) -> None:
    job = training_job(finished, tmp_path, num_train_epochs=500)
    ranks: list[int] = []

    def both_train() -> None:
        wait_until(lambda: training(job))
        ranks.extend(process_groups(job.work))

    with interrupted(both_train, again=True):
        TWO.run(job, lambda _: None)
    assert len(ranks) == 2
    assert list(job.checkpoints.glob("checkpoint-*"))  # the second word cut nothing short
    assert not process_groups(job.work)
