"""Killed, interrupted, out of memory, disk full, diverging: no partial artifact, and a retry
ends with the same bits as an undisturbed run.

bench/kill_matrix.py has all kill points of SFT and DPO. Here are those that differ in kind.
Dropout is active in all of them.
"""

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import LoraSettings, SftSettings
from ft_assets.errors import ArtifactError, MemoryPlanError, TrainingError
from ft_assets.job import Job
from ft_assets.launchers.local import LocalLauncher
from ft_assets.training import checkpoints as checkpoints_module
from ft_assets.training.callbacks import Progress
from ft_assets.training.checkpoints import damage, last_whole
from ft_assets.training.linears import linear_groups
from ft_assets.training.memory_plan.estimate import CONTEXT_BYTES
from ft_assets.training.memory_plan.plan import MARGIN, Machine
from ft_assets.training.prepare import plan_sft
from ft_assets_tests.kill_points import run
from ft_assets_tests.launching import process_groups
from ft_assets_tests.training import LORA, SFT, dpo, make_rows, same, sft, silent

pytestmark = pytest.mark.graph

STEPS = 15  # 18 rows, 4 a step, 3 epochs


class Heard(list):
    def __call__(self, message: str, **numbers: Any) -> None:
        self.append((message, numbers))

    def of(self, message: str) -> list[dict[str, Any]]:
        return [numbers for said, numbers in self if said.startswith(message)]


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert sft(tiny_model, folder)["steps"] == STEPS
    return folder


def test_two_runs_of_one_version_are_the_same_bit_for_bit(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    sft(tiny_model, tmp_path)
    assert same(tmp_path / "output", undisturbed / "output")
    (tmp_path / "other").mkdir()
    sft(tiny_model, tmp_path / "other", seed=43)
    assert not same(tmp_path / "other/output", undisturbed / "output")


@pytest.mark.parametrize(
    ("point", "call"),
    [
        ("mid-accumulation", 13),
        ("checkpoint: optimizer written", 3),
        ("checkpoint: after its rename", 5),
        ("validation", 3),
        ("before CURRENT", 1),
    ],
)
def test_killed_sft_goes_on_and_ends_the_same(
    point: str, call: int, tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "work.json").write_text(json.dumps({"kind": "sft", "base": str(tiny_model)}))
    store = ArtifactStore(tmp_path / "store")
    assert run(point, call, tmp_path) == -signal.SIGKILL
    assert store.current("sft", "tiny") is None
    assert run("none", 0, tmp_path) == 0
    done = store.need("sft", "tiny")
    assert same(done.path, undisturbed / "output")
    assert done.metrics["steps"] == STEPS
    assert (done.metrics["resumed_from_step"] > 0) == (
        point != "before CURRENT"
    )  # that one was whole: it is found


def test_killed_dpo_in_its_second_epoch_goes_on_and_ends_the_same(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    adapter = undisturbed / "output"
    dpo(tiny_model, adapter, tmp_path / "whole", trainer={"disable_dropout": False})
    work = {
        "kind": "dpo",
        "base": str(tiny_model),
        "adapter": str(adapter),
        "settings": {"trainer": {"disable_dropout": False}},
    }
    (tmp_path / "work.json").write_text(json.dumps(work))
    assert (
        run("forward pass of a pair", 10, tmp_path) == -signal.SIGKILL
    )  # ten pairs, two at once: step 5 of 6
    assert run("none", 0, tmp_path) == 0
    done = ArtifactStore(tmp_path / "store").need("dpo", "tiny")
    assert same(done.path, tmp_path / "whole/output")
    assert done.metrics["resumed_from_step"] == 4
    assert done.metrics["reference_reused"] is True


def test_damaged_checkpoint_is_skipped_and_said(
    tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints/checkpoint-15/optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    heard = Heard()
    metrics = sft(tiny_model, tmp_path, heard)
    assert any(
        "checkpoint-15 is not resumed from: optimizer.pt has 100 of" in message
        for message, _ in heard
    )
    assert metrics["resumed_from_step"] == 14
    assert same(tmp_path / "output", undisturbed / "output")


def test_checkpoint_without_its_list_of_files_is_not_whole(
    undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/checkpoint-15/whole.json").unlink()
    (tmp_path / "checkpoints/checkpoint-14/rng_state.pth").unlink()
    assert damage(tmp_path / "checkpoints/checkpoint-15") == "it was not written completely"
    assert "rng_state.pth has 0 of" in str(damage(tmp_path / "checkpoints/checkpoint-14"))
    assert last_whole(tmp_path / "checkpoints", silent) is None
    assert list((tmp_path / "checkpoints").glob("checkpoint-*")) == []


def test_last_step_that_is_no_end_of_an_epoch_is_not_trained_beyond(
    tiny_model: Path, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        sft(tiny_model, tmp_path / folder, max_steps=7)
        if folder == "one":
            shutil.copytree(tmp_path / "one/checkpoints", tmp_path / "two/checkpoints")
    metrics = sft(tiny_model, tmp_path / "two", max_steps=7)
    assert metrics["steps"] == 7
    assert metrics["resumed_from_step"] == 7
    assert same(tmp_path / "one/output", tmp_path / "two/output")


@pytest.mark.parametrize("times", [1, 2], ids=["once", "by systemd and by the launcher"])
def test_interrupt_leaves_a_checkpoint_of_the_step_and_a_retry_ends_the_same(
    tiny_model: Path, undisturbed: Path, tmp_path: Path, times: int
) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupt(message: str, **numbers: Any) -> None:
        if (
            message == "train"
            and numbers["step"] == 5
            and not list(tmp_path.glob("checkpoints/checkpoint-6"))
        ):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        sft(tiny_model, tmp_path, interrupt, save_steps=100)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-6"
    ]
    assert not list((tmp_path / "output").iterdir())
    assert sft(tiny_model, tmp_path, save_steps=100)["resumed_from_step"] == 6
    assert same(tmp_path / "output", undisturbed / "output")


@pytest.mark.parametrize(("first", "then"), [("qlora", "lora"), ("lora", "qlora")])
def test_auto_stays_what_it_was_when_its_checkpoints_were_begun(
    first: str, then: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inject the memory of a GPU on which `auto` is `first`, and for the retry `then`."""
    pytest.importorskip("bitsandbytes")
    from ft_assets.training import sft as module

    settings = {"packing": False, "gradient_checkpointing": False}
    sft(tiny_model, tmp_path / "whole", lora={"method": first}, **settings)

    def machine(method: str) -> Machine:
        needs = {}
        for name in ("lora", "qlora"):
            kind, plain = (
                LoraSettings.model_validate({**LORA, "method": name}),
                SftSettings.model_validate({**SFT, **settings}),
            )
            needs[name] = (
                plan_sft(tiny_model, kind, plain, make_rows(18), Machine(True, 1e12)).predicted
                + CONTEXT_BYTES
            )
        assert needs["qlora"] < needs["lora"]
        return Machine(
            True, (2 * needs["lora"] if method == "lora" else sum(needs.values()) / 2) / MARGIN
        )

    monkeypatch.setattr(module, "this_machine", lambda _: machine(first))
    assert sft(tiny_model, tmp_path, **settings)["method"] == first
    (tmp_path / "checkpoints/checkpoint-15/whole.json").unlink()
    shutil.rmtree(tmp_path / "output")
    monkeypatch.setattr(module, "this_machine", lambda _: machine(then))
    heard = Heard()
    if then == "lora":
        metrics = sft(tiny_model, tmp_path, heard, **settings)
        assert (metrics["method"], metrics["resumed_from_step"]) == (first, 14)
        assert heard.of("lora.method: auto stays qlora")
        assert same(tmp_path / "output", tmp_path / "whole/output")
        return
    with pytest.raises(
        MemoryPlanError,
        match=r"auto was lora when the checkpoints[\s\S]*name another lora.method[\s\S]*or delete",
    ):
        sft(tiny_model, tmp_path, heard, **settings)
    assert last_whole(tmp_path / "checkpoints", silent)  # nothing was thrown away
    shutil.rmtree(tmp_path / "checkpoints")
    assert sft(tiny_model, tmp_path, heard, **settings)["method"] == then


def test_full_disk_keeps_the_checkpoint_before(
    tiny_model: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real ENOSPC: the optimizer's file of the second checkpoint is /dev/full."""
    real, calls = checkpoints_module.Trainer._save_optimizer_and_scheduler, itertools.count(1)

    def full(self: Any, folder: str) -> None:
        if next(calls) == 2:
            (Path(folder) / "optimizer.pt").symlink_to("/dev/full")
        real(self, folder)

    monkeypatch.setattr(checkpoints_module.Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(ArtifactError, match=r"the disk is full: the checkpoint of step 4"):
        sft(tiny_model, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-2"
    ]
    assert damage(tmp_path / "checkpoints/checkpoint-2") is None
    assert sft(tiny_model, tmp_path)["resumed_from_step"] == 2
    assert same(tmp_path / "output", undisturbed / "output")


def test_memory_that_runs_out_halves_the_micro_batch_at_the_same_effective_batch(
    tiny_model: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inject an out-of-memory error: from step 6 on, more than one conversation does not fit."""
    from ft_assets.training import sft as module

    real = module.ResumingCpuSFTTrainer.training_step

    def small(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        if self.state.global_step >= 5 and (inputs["position_ids"] == 0).sum() > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, model, inputs, *rest)

    monkeypatch.setattr(module.ResumingCpuSFTTrainer, "training_step", small)
    heard = Heard()
    metrics = sft(tiny_model, tmp_path, heard, micro_batch=4, lora={"lora_dropout": 0.0})
    assert (metrics["micro_batch"], metrics["out_of_memory"], metrics["steps"]) == (1, 2, STEPS)
    assert [numbers["micro_batch"] for numbers in heard.of("out of memory")] == [2, 1]
    assert [numbers["step"] for numbers in heard.of("resumed")] == [
        5,
        5,
    ]  # not the last written one, 4: the last step
    monkeypatch.undo()
    sft(tiny_model, tmp_path / "whole", micro_batch=4, lora={"lora_dropout": 0.0})
    curves = [
        json.loads((path / "output/info/curve.json").read_text())
        for path in (tmp_path, tmp_path / "whole")
    ]
    losses = [[entry["loss"] for entry in curve] for curve in curves]
    assert losses[0] == pytest.approx(
        losses[1], abs=0.02
    )  # the same rows in every step; bf16 rounds otherwise
    assert len(losses[0]) == STEPS


def test_memory_that_runs_out_within_a_layer_leaves_no_activations_to_the_retry(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected in step 3 between gate_proj and up_proj, whose outputs are computed together."""
    from ft_assets.training import sft as module

    real, held = module.ResumingCpuSFTTrainer.training_step, []

    def short(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def recorded(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        activation = self.model.get_base_model().get_decoder().layers[1].mlp.act_fn
        if self.state.global_step == 2 and not held:
            activation.forward = short
            try:
                return real(self, model, inputs, *rest)
            finally:
                del activation.forward
                held.append(len(holding(self.model)))
        if len(held) == 1:
            held.append(len(holding(self.model)))
        return real(self, model, inputs, *rest)

    monkeypatch.setattr(module.ResumingCpuSFTTrainer, "training_step", recorded)
    assert sft(tiny_model, tmp_path, num_train_epochs=1)["out_of_memory"] == 1
    assert held == [1, 0]  # when it ran out, and when the smaller micro-batch begins


def holding(model: Any) -> list[Any]:
    return [group for group in linear_groups(model) if group._outputs or group._input is not None]


def test_memory_that_runs_out_in_dpo_halves_the_micro_batch_and_keeps_the_reference(
    tiny_model: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected: more than one pair does not fit from step 3 on."""
    from ft_assets.training import dpo as module

    real, scored = module.PairTrainer.training_step, []

    def small(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        if self.state.global_step >= 2 and len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, model, inputs, *rest)

    score = module.score_reference
    monkeypatch.setattr(module, "score_reference", lambda *args: scored.append(1) or score(*args))
    monkeypatch.setattr(module.PairTrainer, "training_step", small)
    heard, adapter = Heard(), undisturbed / "output"
    metrics = dpo(tiny_model, adapter, tmp_path, heard, micro_batch=4, learning_rate=1e-2)
    assert (metrics["micro_batch"], metrics["out_of_memory"], metrics["steps"]) == (1, 2, 6)
    assert [numbers["micro_batch"] for numbers in heard.of("out of memory")] == [2, 1]
    assert [numbers["step"] for numbers in heard.of("resumed")] == [2, 2]
    assert (len(scored), len(heard.of("reference proven"))) == (
        1,
        1,
    )  # once, of the policy before its first step
    monkeypatch.undo()
    dpo(tiny_model, adapter, tmp_path / "whole", micro_batch=4, learning_rate=1e-2)
    curves = [
        json.loads((path / "output/info/curve.json").read_text())
        for path in (tmp_path, tmp_path / "whole")
    ]
    for name in ("loss", "reward_margins"):
        numbers = [[entry[name] for entry in curve] for curve in curves]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.03), (
            name
        )  # the same pairs in every step; bf16 rounds otherwise
    assert (
        curves[1][-1]["reward_margins"] > 0.3
    )  # the pairs are learnt: equal numbers mean something


def test_memory_for_not_even_one_row_is_the_users_error(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ft_assets.training import sft as module

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(module.ResumingCpuSFTTrainer, "training_step", never)
    with pytest.raises(
        TrainingError,
        match=r"sft: step 1: one row at a time does not fit into memory \(CUDA out of memory\)",
    ):
        sft(tiny_model, tmp_path)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_the_step_and_the_checkpoint_before_stays(
    where: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected in step 6: a loss of nan, or a finite loss whose gradient is inf."""
    from ft_assets.training import sft as module

    real = module.ResumingCpuSFTTrainer.compute_loss

    def broken(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        loss = real(self, model, inputs, *rest, **more)
        if self.state.global_step != 5:
            return loss
        if where == "loss":
            return loss * float("nan")
        weight = next(value for value in model.parameters() if value.requires_grad)
        return loss + (weight.sum() - weight.sum().detach()) * float("inf")

    monkeypatch.setattr(module.ResumingCpuSFTTrainer, "compute_loss", broken)
    with pytest.raises(
        TrainingError, match=r"step 6: the (loss|gradient) is (nan|inf)[\s\S]*lower learning_rate"
    ):
        sft(tiny_model, tmp_path, save_steps=1)
    whole = last_whole(tmp_path / "checkpoints", silent)
    assert whole is not None
    assert whole.name == "checkpoint-5"


def test_weights_that_are_not_finite_are_never_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback

    from ft_assets.training import loop as module

    class Spoil(TrainerCallback):
        def on_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            if state.global_step == 3:
                next(value for value in model.parameters() if value.requires_grad).data.fill_(
                    float("nan")
                )

    monkeypatch.setattr(module, "_OptimizerStep", lambda: Spoil())
    with pytest.raises(TrainingError, match=r"step 4: 1 trained weights are not finite"):
        sft(tiny_model, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-2"
    ]


def test_loss_that_rises_for_good_stops_the_step() -> None:
    progress, state = (
        Progress(silent, 100.0, max_loss_rise=1.0),
        SimpleNamespace(global_step=0, max_steps=100, log_history=[], num_input_tokens_seen=0),
    )
    progress.on_train_begin(None, state, None)
    losses = [5 - 0.2 * step for step in range(20)] + [4.0] * 3 + [9.0] * 10
    with pytest.raises(
        TrainingError,
        match=r"training diverges: the loss of the last 10 steps is [\d.]+ and was [\d.]+",
    ):
        for step, loss in enumerate(losses, start=1):
            state.global_step = step
            progress.on_log(None, state, None, {"loss": loss})
    assert 23 < state.global_step < 33  # not for a single bad step


def test_loss_that_rises_a_little_goes_on() -> None:
    progress, state = (
        Progress(silent, 100.0, max_loss_rise=1.0),
        SimpleNamespace(global_step=0, max_steps=100, log_history=[], num_input_tokens_seen=0),
    )
    progress.on_train_begin(None, state, None)
    for step in range(1, 60):
        state.global_step = step
        progress.on_log(None, state, None, {"loss": 2.0 + 0.5 * (step % 2) + 0.01 * step})
    assert len(progress.curve) == 59


def test_cancelled_run_ends_within_its_grace_with_a_checkpoint_and_goes_on_later(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Interrupt the launching process, as a cancelled run of the UI does."""
    (tmp_path / "split").mkdir()
    (tmp_path / "output").mkdir()
    for name, rows in (("train", make_rows(18)), ("validation", make_rows(4, seed=9))):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "split" / f"{name}.parquet")
    job = Job(
        step="sft",
        gpu=True,
        distributed=True,
        asset="test",
        partition="tiny",
        fingerprint="0",
        output=tmp_path / "output",
        checkpoints=tmp_path / "checkpoints",
        work=tmp_path / "work",
        settings={"lora": LORA, "sft": {**SFT, "num_train_epochs": 400, "save_steps": 10_000}},
        inputs={"base_model": tiny_model, "heldout_split": tmp_path / "split"},
    )
    asked: list[float] = []
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where the tests run in a script's background

    def cancel(line: Any) -> None:
        if line["message"] == "train" and not asked:
            assert process_groups(job.work)
            asked.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        LocalLauncher().run(job, cancel)
    assert time.monotonic() - asked[0] < 30
    assert not process_groups(job.work)
    assert not list(job.output.iterdir())
    whole = last_whole(job.checkpoints, silent)
    assert whole is not None
    seen: list[Any] = []

    def once(line: Any) -> None:
        seen.append(line)
        if line["message"] == "train":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        LocalLauncher().run(job.model_copy(update={"work": tmp_path / "again"}), once)
    resumed = next(line for line in seen if line["message"] == "resumed")
    assert resumed["step"] == int(whole.name.removeprefix("checkpoint-"))
