"""A base that is divided among ranks: the same training, the same adapter, the same promises as with one process."""

from pathlib import Path

import pytest

from ft_assets.config.launcher import AccelerateSettings
from ft_assets.launchers import LocalLauncher
from ft_assets.launchers.accelerate import AccelerateLauncher
from ft_assets_tests.launching import require_same_training, trained, training_job

DIVIDED = AccelerateLauncher(AccelerateSettings(kind="accelerate", processes=2, sharding="fsdp"))


@pytest.mark.parametrize("step", ["sft", "dpo"])
def test_divided_base_trains_what_one_process_trains(finished: Path, tmp_path: Path, step: str) -> None:
    alone, divided = training_job(finished, tmp_path / "1", step), training_job(finished, tmp_path / "2", step)
    trained(LocalLauncher(), alone)
    _, _, metrics = trained(DIVIDED, divided)
    require_same_training(alone, divided)
    assert metrics["base_shards"] == 2
