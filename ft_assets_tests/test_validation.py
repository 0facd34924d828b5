"""Test that the validation loss chooses the weights and ends training.

The held-out rows never do.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ft_assets.errors import TrainingError
from ft_assets.evaluation.curves import overfitting, up_to_kept
from ft_assets.training import validation as module
from ft_assets.training.pair_loss import PairLoss
from ft_assets.training.pair_trainer import PairTrainer
from ft_assets.training.reference import batches, scores
from ft_assets_tests.training import EOS, dpo, same, sft

TURNS = [5.0, 3.0, 2.0, 2.5, 3.0, 3.5, 4.0]  # lowest after the second epoch (step 10)


@pytest.fixture
def turning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a validation loss that is a function of the step.

    The tiny model does not overfit within the time of a test.
    """

    def losses(model: Any, rows: Any, *_: Any) -> Any:
        return [TURNS[Validated.step // 5]] * len(rows), []

    class Validated(module.Validation):
        step = 0

        def _record(self, model: Any, state: Any) -> None:
            Validated.step = state.global_step
            super()._record(model, state)

    monkeypatch.setattr(module, "answer_losses", losses)
    monkeypatch.setattr("ft_assets.training.sft.Validation", Validated)


@pytest.mark.slow
@pytest.mark.usefixtures("turning")
def test_weights_of_the_lowest_validation_loss_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    best = sft(tiny_model, tmp_path / "best", num_train_epochs=4)
    assert (best["kept_step"], best["validation_loss"], best["steps"], best["stopped_early"]) == (
        10,
        2.0,
        20,
        False,
    )
    last = sft(tiny_model, tmp_path / "last", num_train_epochs=4, keep="last")
    assert (last["kept_step"], last["validation_loss"]) == (20, 3.0)
    assert not same(tmp_path / "best/output", tmp_path / "last/output")
    stopped = sft(tiny_model, tmp_path / "ten", num_train_epochs=6, early_stopping={"patience": 2})
    # Training stops two measurements after the best.
    assert (stopped["kept_step"], stopped["steps"], stopped["stopped_early"]) == (10, 20, True)
    assert sft(tiny_model, tmp_path / "six", num_train_epochs=6)["steps"] == 30
    assert same(tmp_path / "ten/output", tmp_path / "six/output")
    curve = json.loads((tmp_path / "best/output/info/validation.json").read_text())
    assert [entry["step"] for entry in curve if entry.get("kept")] == [10]
    assert up_to_kept(curve)[-1]["step"] == 10


@pytest.mark.usefixtures("turning")
def test_early_stop_is_the_end_also_for_a_retry(tiny_model: Path, tmp_path: Path) -> None:
    metrics = sft(tiny_model, tmp_path / "one", num_train_epochs=6, early_stopping={"patience": 1})
    assert (metrics["steps"], metrics["kept_step"], metrics["stopped_early"]) == (15, 10, True)
    shutil.copytree(tmp_path / "one/checkpoints", tmp_path / "two/checkpoints")
    again = sft(tiny_model, tmp_path / "two", num_train_epochs=6, early_stopping={"patience": 1})
    assert (again["steps"], again["resumed_from_step"], again["stopped_early"]) == (15, 15, True)
    assert same(tmp_path / "one/output", tmp_path / "two/output")


@pytest.mark.usefixtures("turning")
def test_best_weights_survive_a_resume(tiny_model: Path, tmp_path: Path) -> None:
    sft(tiny_model, tmp_path / "one", num_train_epochs=4)
    shutil.copytree(tmp_path / "one/checkpoints", tmp_path / "two/checkpoints")
    (tmp_path / "two/checkpoints/checkpoint-20/whole.json").unlink()
    assert sft(tiny_model, tmp_path / "two", num_train_epochs=4)["resumed_from_step"] == 18
    assert same(tmp_path / "one/output", tmp_path / "two/output")


def test_validation_every_few_steps(tiny_model: Path, tmp_path: Path) -> None:
    sft(tiny_model, tmp_path, num_train_epochs=2, eval_steps=4)
    curve = json.loads((tmp_path / "output/info/validation.json").read_text())
    assert [entry["step"] for entry in curve] == [0, 4, 8, 10]


def test_validation_uses_the_plans_room_and_names_itself_where_memory_ran_out(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(model: Any, rows: Any, *room: Any) -> Any:
        calls.append(room)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(module, "answer_losses", full)
    said: list[tuple[str, dict[str, Any]]] = []
    with pytest.raises(TrainingError, match="validation loss") as failed:
        sft(tiny_model, tmp_path, lambda message, **numbers: said.append((message, numbers)))
    plan = next(numbers for message, numbers in said if message == "plan")
    assert plan["micro_batch"] == 2
    # There is one call: a smaller micro-batch of the training does not help.
    assert calls == [(2, EOS + 1, plan["largest_micro_batch_tokens"])]
    assert "micro_batch" not in failed.value.fix


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    sft(tiny_model, folder)
    return folder / "output"


@pytest.fixture
def turning_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject the same losses into DPO.

    An epoch has three steps. The lowest loss is after the second epoch (step 6).
    """
    monkeypatch.setattr(
        PairLoss,
        "__call__",
        lambda self, model: {"validation_loss": TURNS[self.trainer.state.global_step // 3]},
    )


@pytest.mark.slow
@pytest.mark.usefixtures("turning_pairs")
def test_dpo_keeps_the_weights_of_the_lowest_validation_loss_also_after_a_resume(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    best = dpo(tiny_model, adapter, tmp_path / "best", validation=8, num_train_epochs=4)
    assert (best["kept_step"], best["validation_loss"], best["steps"], best["kept_why"]) == (
        6,
        2.0,
        12,
        "the lowest validation loss",
    )
    last = dpo(
        tiny_model, adapter, tmp_path / "last", validation=8, num_train_epochs=4, keep="last"
    )
    assert (last["kept_step"], last["kept_why"]) == (12, "dpo.keep is last")
    assert not same(tmp_path / "best/output", tmp_path / "last/output")
    curve = json.loads((tmp_path / "best/output/info/validation.json").read_text())
    assert [(entry["step"], entry["validation_loss"], entry.get("kept")) for entry in curve] == [
        (0, 5.0, None),
        (3, 3.0, None),
        (6, 2.0, True),
        (9, 2.5, None),
        (12, 3.0, None),
    ]
    shutil.copytree(tmp_path / "best/checkpoints", tmp_path / "two/checkpoints")
    (tmp_path / "two/checkpoints/checkpoint-12/whole.json").unlink()
    resumed = dpo(tiny_model, adapter, tmp_path / "two", validation=8, num_train_epochs=4)
    assert resumed["resumed_from_step"] == 10
    assert same(tmp_path / "best/output", tmp_path / "two/output")


@pytest.mark.usefixtures("turning_pairs")
def test_dpo_stops_early_also_for_a_retry(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    stop = {"validation": 8, "num_train_epochs": 6, "early_stopping": {"patience": 1}}
    metrics = dpo(tiny_model, adapter, tmp_path / "one", **stop)
    assert (metrics["steps"], metrics["kept_step"], metrics["stopped_early"]) == (9, 6, True)
    shutil.copytree(tmp_path / "one/checkpoints", tmp_path / "two/checkpoints")
    again = dpo(tiny_model, adapter, tmp_path / "two", **stop)
    assert (again["steps"], again["resumed_from_step"], again["stopped_early"]) == (9, 9, True)
    assert same(tmp_path / "one/output", tmp_path / "two/output")


def test_dpo_measures_its_own_loss_and_disturbs_nothing(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    said: list[dict[str, Any]] = []
    measured = dpo(
        tiny_model,
        adapter,
        tmp_path / "measured",
        lambda message, **numbers: said.append(numbers) if message == "validation" else None,
        validation=9,
        eval_steps=2,
        keep="last",
    )
    curve = json.loads((tmp_path / "measured/output/info/validation.json").read_text())
    assert [entry["step"] for entry in curve] == [0, 2, 4, 6] == [entry["step"] for entry in said]
    # The policy equals the reference before the first step.
    assert curve[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert curve[0]["validation_margin"] == pytest.approx(0, abs=1e-2)
    assert {
        name: measured[name] for name in curve[-1] if name.startswith("validation_")
    }.items() <= curve[-1].items()
    assert measured["validation_pairs"] == 9
    without = dpo(tiny_model, adapter, tmp_path / "without")
    assert same(tmp_path / "measured/output", tmp_path / "without/output")
    shown = [
        json.loads((tmp_path / f"{name}/output/info/curve.json").read_text())
        for name in ("measured", "without")
    ]
    for name in ("loss", "reward_margins", "reward_accuracies"):
        assert [entry[name] for entry in shown[0]] == [entry[name] for entry in shown[1]]
    assert (
        without["kept_why"] == "the last step: no validation loss was measured: "
        "fewer than 8 of the pairs would be validation pairs"
    )


def test_validation_loss_of_pairs_is_that_of_the_paper_over_all_of_them(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, found = PairLoss.__call__, []

    def both(self: PairLoss, model: Any) -> dict[str, float]:
        margins = []
        # The batches are the same, so that the rounding is the same.
        for rows in batches(self.pairs, self.batch):
            few = [self.pairs[row] for row in rows]
            for pair, (chosen, rejected) in zip(few, scores(self.trainer, few), strict=True):
                margins.append(
                    (chosen - pair["ref_chosen_logps"]) - (rejected - pair["ref_rejected_logps"])
                )
        found.append((own(self, model), margins))
        return found[-1][0]

    monkeypatch.setattr(PairLoss, "__call__", both)
    dpo(
        tiny_model,
        adapter,
        tmp_path,
        validation=9,
        learning_rate=2e-2,
        num_train_epochs=4,
        beta=1.0,
    )
    assert len(found) == 5 and abs(found[-1][0]["validation_margin"]) > 0.1
    for measured, margins in found:  # Rafailov et al. 2023, eq. 7, with a beta of 1
        assert len(margins) == 9
        assert measured["validation_margin"] == pytest.approx(sum(margins) / 9, abs=1e-4)
        assert measured["validation_accuracy"] == pytest.approx(
            sum(margin > 0 for margin in margins) / 9
        )
        assert measured["validation_loss"] == pytest.approx(
            sum(math.log1p(math.exp(-margin)) for margin in margins) / 9, abs=1e-4
        )


def test_pairs_that_do_not_fit_at_once_are_halved(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, sizes = PairTrainer.compute_loss, list[int]()

    def full(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and self.state.global_step:
            sizes.append(len(inputs["input_ids"]) // 2)
            if sizes[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return own(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "compute_loss", full)
    most = 1
    metrics = dpo(tiny_model, adapter, tmp_path / "halved", validation=8)
    assert (metrics["out_of_memory"], sizes[0], set(sizes[1:])) == (0, 2, {1})
    most = 0
    with pytest.raises(TrainingError, match="dpo: validation loss"):
        dpo(tiny_model, adapter, tmp_path / "full", validation=8)


@pytest.mark.parametrize(
    ("losses", "patience", "delta", "enough"),
    [
        ([3, 2, 1], 1, 0.0, False),
        ([3, 2, 2], 1, 0.0, True),
        ([3, 2, 2.5], 2, 0.0, False),
        ([3, 2, 2.5, 2.1], 2, 0.0, True),
        ([3, 2, 1.95], 1, 0.1, True),
        ([3, 2, 1.8], 1, 0.1, False),
        ([3], 1, 0.0, False),
    ],
)
def test_patience_and_min_delta(
    losses: list[float], patience: int, delta: float, enough: bool
) -> None:
    rule = SimpleNamespace(early_stopping=SimpleNamespace(patience=patience, min_delta=delta))
    watch = module.Validation(None, rule, "sft", Path(), lambda *_, **__: None)  # type: ignore[arg-type]
    watch.losses = [{"step": step, "validation_loss": loss} for step, loss in enumerate(losses)]
    assert watch._patience_is_over() is enough


def test_curves_that_part_are_overfitting() -> None:
    curve = [{"step": step, "loss": 3 - 0.1 * step} for step in range(1, 21)]
    parted = [
        {"step": step, "validation_loss": loss}
        for step, loss in ((0, 3.0), (5, 2.5), (10, 2.2), (15, 2.6), (20, 2.9))
    ]
    rise, text = overfitting(curve, parted)
    assert rise == pytest.approx(2.9 / 2.2 - 1)
    assert "overfits from step 10 on" in text
    assert overfitting(curve, parted[:3])[0] is None
    flat = [{**entry, "loss": 1.0} for entry in curve]
    # A training loss that does not fall is unstable, not overfit.
    assert overfitting(flat, parted)[0] is None
    assert overfitting(curve, []) == (None, "no validation loss was measured")
