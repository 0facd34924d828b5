"""What streams to the UI while it trains, and what of it outlives a retry."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ft_assets.orchestration.materializer import Live
from ft_assets.training import callbacks, flops
from ft_assets.training.memory_plan.model_shape import snapshot_shape
from ft_assets_tests.training import dpo, make_pairs, sft


class Heard(list[dict[str, Any]]):
    """Takes a step's messages as the launcher hands them on, and shows them as the asset does."""

    def __init__(self) -> None:
        super().__init__()
        context: Any = SimpleNamespace(
            log=SimpleNamespace(info=lambda text: None),
            asset_key="adapter",
            log_event=lambda event: self.append(event.metadata),
        )
        self.live = Live(context, "tiny")

    def __call__(self, message: str, **numbers: Any) -> None:
        self.live({"message": message, "time": 0.0, **numbers})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock, for want of a GPU: its peak is so low that the tiny model's share shows."""
    monkeypatch.setattr(callbacks, "gpu_name", lambda: "Slow card")
    monkeypatch.setattr(flops, "PEAKS", {"Slow": 1e-3})


def shares(heard: Heard) -> list[tuple[float, float]]:
    """Return (tokens/s, percent of the peak) of each observation of a step."""
    trained = [numbers for numbers in heard if "live/tokens_per_s" in numbers]
    assert trained
    return [
        (numbers["live/tokens_per_s"].value, numbers["live/mfu_percent"].value)
        for numbers in trained
    ]


@pytest.mark.usefixtures("gpu")
def test_share_of_the_gpus_peak_is_shown_live_and_in_the_metadata(
    tiny_model: Path, tmp_path: Path
) -> None:
    percent = 100 * flops.flops_per_token(snapshot_shape(tiny_model)) / 1e9
    heard = Heard()
    metrics = sft(tiny_model, tmp_path / "sft", heard, num_train_epochs=1)
    for speed, share in shares(heard):
        assert share == pytest.approx(speed * percent, rel=0.01)
    assert metrics["mfu_percent"] == pytest.approx(metrics["tokens_per_s"] * percent, rel=0.01)
    heard = Heard()
    metrics = dpo(tiny_model, tmp_path / "sft/output", tmp_path / "dpo", heard, num_train_epochs=1)
    assert metrics["prompts_shared"]
    pairs = make_pairs(10)
    counted = sum(
        2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])
        for pair in pairs
    )
    computed = sum(
        len(pair["prompt_ids"]) + 1 + len(pair["chosen_ids"]) + len(pair["rejected_ids"])
        for pair in pairs
    )
    for speed, share in [*shares(heard), (metrics["tokens_per_s"], metrics["mfu_percent"])]:
        assert share == pytest.approx(speed * percent * computed / counted, rel=0.01)


def test_where_no_peak_is_known_no_share_is_shown(tiny_model: Path, tmp_path: Path) -> None:
    heard = Heard()
    metrics = sft(tiny_model, tmp_path, heard, num_train_epochs=1)
    assert "mfu_percent" not in metrics
    assert not any("live/mfu_percent" in numbers for numbers in heard)


@pytest.mark.usefixtures("gpu")
def test_a_retry_of_a_training_that_was_done_knows_its_speed(
    tiny_model: Path, tmp_path: Path
) -> None:
    first = sft(tiny_model, tmp_path / "one", num_train_epochs=1)
    shutil.copytree(tmp_path / "one/checkpoints", tmp_path / "two/checkpoints")
    again = sft(tiny_model, tmp_path / "two", num_train_epochs=1)
    assert again["resumed_from_step"] == again["steps"]
    assert first["tokens_per_s"] > 0
    assert [again[name] for name in ("tokens_per_s", "mfu_percent")] == [
        first[name] for name in ("tokens_per_s", "mfu_percent")
    ]


def test_a_speed_that_nobody_measured_is_left_out(tmp_path: Path) -> None:
    progress = callbacks.Progress(lambda *_, **__: None, 100.0)
    progress.restore(
        SimpleNamespace(log_history=[{"loss": 1.0, "step": 4}])
    )  # of a checkpoint from before speeds were kept
    assert progress.speed() == {}


def test_long_training_does_not_fill_the_events_and_its_validation_is_all_there() -> None:
    heard = Heard()
    steps = 5000
    for step in range(1, steps + 1):
        at = 1e9 + 3.0 * step  # four hours
        numbers = {"loss": 1 / 3, "tokens_per_s": 9.0, "memory_gb": 1.0, "seconds_left": 1.0}
        heard.live({"message": "train", "time": at, "step": step, "steps": steps, **numbers})
        if step % 1000 == 0:
            heard.live({"message": "validation", "time": at, "validation_loss": 0.5})
    trained = [metadata["live/step"].value for metadata in heard if "live/loss" in metadata]
    assert trained[0] == 1
    assert trained[-1] == steps
    assert 10 <= len(trained) <= 22
    assert len(heard) - len(trained) == 5
    assert heard[0]["live/loss"].value == 0.3333
