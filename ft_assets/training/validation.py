"""The loss of the validation slice while it trains, SFT or DPO: which weights are kept, and when it is enough.

The validation slice is cut from the training rows (or pairs). The held-out rows, which the verdict is about, are never used here.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback

from ft_assets.config import TrainSettings
from ft_assets.errors import TrainingError
from ft_assets.inference.losses import answer_losses
from ft_assets.job import Report
from ft_assets.models.adapter_files import copy_trained
from ft_assets.rows.types import TokenSequence
from ft_assets.training.adapter import save_trained
from ft_assets.training.checkpoints import WholeCheckpoints, disk_is_full, full_disk, publish_folder
from ft_assets.training.memory_plan.plan import Plan
from ft_assets.training.precision import autocast_if_mixed

Measure = Callable[
    [Any], dict[str, float]
]  # of a model: "validation_loss", and what else is known of the slice


class LogsValidation(WholeCheckpoints):
    """Mixin before a TRL trainer: whole checkpoints, and trackers (report_to) get the validation loss with the step it was taken after."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        taken = [
            entry
            for entry in self.state.log_history[-2:]
            if "validation_loss" in entry and entry["step"] == self.state.global_step
        ]
        super().log(
            {**logs, **({"eval_loss": taken[0]["validation_loss"]} if taken else {})}, start_time
        )


class Validation(TrainerCallback):
    """Takes the validation loss before the first step, after each epoch (or every `eval_steps`) and after the last step.

    `losses` holds {"epoch", "step", "validation_loss", …} as `measure` returns them; a resumed run keeps them. With
    `keep: best` the weights of the lowest lie in `<folder>/best-<step>` until they are taken. `measure`: None where there is
    nothing to measure, and `why_not` says why. `key`: where the settings stand (sft, dpo).
    """

    def __init__(
        self,
        measure: Measure | None,
        settings: TrainSettings,
        key: str,
        folder: Path,
        report: Report,
        why_not: str = "",
    ) -> None:
        self.measure, self.settings, self.key, self.folder, self.report, self.why_not = (
            measure,
            settings,
            key,
            folder,
            report,
            why_not,
        )
        self.losses: list[dict[str, float]] = []
        self.stopped_early = False

    @property
    def best(self) -> dict[str, float] | None:
        """The measurement with the lowest loss after the first step (the first of equals), or None without rows."""
        trained = [entry for entry in self.losses if entry["step"] > 0]
        return min(trained, key=lambda entry: entry["validation_loss"], default=None)

    def weights(self) -> Path | None:
        """Return where the best weights lie; None if they are those of the last step, or the last are to be kept."""
        if (
            self.settings.keep == "last"
            or self.best is None
            or self.best["step"] == self.losses[-1]["step"]
        ):
            return None
        return self.folder / f"best-{self.best['step']}"

    def curve(self) -> list[dict[str, Any]]:
        """Return the measurements, the one of the kept weights marked."""
        kept = self.losses[-1] if self.settings.keep == "last" and self.losses else self.best
        return [{**entry, "kept": True} if entry is kept else entry for entry in self.losses]

    def facts(self) -> dict[str, Any]:
        """Return what was kept and why, for the metrics."""
        if self.best is None:
            return {"kept_why": "the last step: no validation loss was measured" + self.why_not}
        kept = self.best if self.settings.keep == "best" else self.losses[-1]
        return {
            "kept_step": kept["step"],
            "kept_why": "the lowest validation loss"
            if self.settings.keep == "best"
            else f"{self.key}.keep is last",
            **{name: value for name, value in kept.items() if name.startswith("validation_")},
            "stopped_early": self.stopped_early,
        }

    def restore(self, state: Any) -> None:
        """Take over the measurements of a resumed run."""
        self.losses = [entry for entry in state.log_history if "validation_loss" in entry]
        self.stopped_early = self._enough()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.restore(state)
        if self.measure and not self.losses:
            self._take(model, state)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        # Before the step's checkpoint is written, so that a resume after it has this measurement.
        last = state.global_step >= state.max_steps
        due = (
            state.global_step % self.settings.eval_steps == 0
            if self.settings.eval_steps
            else float(state.epoch).is_integer()
        )
        if not self.measure or not (due or last):
            return
        self._take(model, state)
        if (
            args.should_save
            and self.settings.keep == "best"
            and self.best
            and self.best["step"] == state.global_step
            and not last
        ):
            self._put_aside(model, state.global_step)
        if self._enough() and not last:
            self.stopped_early = True
            state.max_steps = (
                state.global_step
            )  # a resume from this step's checkpoint knows that it was the last
            control.should_training_stop = control.should_save = True
            self.report(
                "stopped early",
                step=state.global_step,
                best_step=self.best["step"] if self.best else 0,
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the weights that were the best before: no checkpoint leads back to them any more."""
        for old in self.folder.glob("best-*") if args.should_save else ():
            if self.best is None or old.name != f"best-{self.best['step']}":
                shutil.rmtree(old, ignore_errors=True)

    def _enough(self) -> bool:
        """Return whether the loss has not fallen by `min_delta` in the last `patience` measurements."""
        rule = self.settings.early_stopping
        if rule is None or len(self.losses) <= rule.patience:
            return False
        before, since = self.losses[: -rule.patience], self.losses[-rule.patience :]
        fell = min(_loss(before)) - min(_loss(since))
        return fell <= 0 or fell < rule.min_delta

    def _take(self, model: Any, state: Any) -> None:
        measured = {name: round(value, 4) for name, value in self._measured(model).items()}
        entry = {
            "epoch": round(float(state.epoch or 0.0), 3),
            "step": state.global_step,
            **measured,
        }
        self.losses.append(entry)
        state.log_history.append(entry)
        self.report("validation", **entry)

    def _measured(self, model: Any) -> dict[str, float]:
        assert self.measure is not None
        try:
            return self.measure(model)
        except (
            torch.OutOfMemoryError
        ) as error:  # a smaller micro-batch of the training would not help
            said = str(error).split("\n")[0].partition(". ")[0]
            error.__traceback__ = None  # its frames hold the activations
        raise TrainingError(
            where=f"{self.key}: validation loss",
            found=f"a row of the validation slice does not fit into memory ({said})",
            expected="room for it",
            fix="lower chat.max_length, or lora.method: qlora, or set data.validation_share: 0",
        )

    def _put_aside(self, model: Any, step: int) -> None:
        staged = self.folder / f".best-{step}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            save_trained(model, staged)
            publish_folder(staged, self.folder / f"best-{step}")
        except Exception as error:
            if not disk_is_full(error):
                raise
            shutil.rmtree(staged, ignore_errors=True)
            raise full_disk(self.folder, f"the best weights so far (step {step})") from error


def answer_loss(rows: list[dict[str, Any]], plan: Plan, pad: int) -> Measure | None:
    """Return what measures the mean loss of tokenized rows in nats a token, None without rows. As many rows and tokens at once
    as the plan has found room for with gradients."""

    def measure(model: Any) -> dict[str, float]:
        training = model.training
        with autocast_if_mixed(model):
            scored = cast(list[TokenSequence], rows)
            losses, _ = answer_losses(model, scored, plan.micro_batch, pad, plan.largest)
        model.train(training)
        return {"validation_loss": sum(losses) / len(losses)}

    return measure if rows else None


def save_kept(model: Any, watch: Validation, curve: list[dict[str, float]], output: Path) -> None:
    """Write the weights that are kept to `output`, and to its `info` the curves of the training."""
    best = watch.weights()
    if best is not None:
        copy_trained(best, output)
    else:
        save_trained(model, output)
    (output / "info").mkdir(exist_ok=True)
    (output / "info" / "curve.json").write_text(json.dumps(curve))
    (output / "info" / "validation.json").write_text(json.dumps(watch.curve()))


def _loss(entries: list[dict[str, float]]) -> list[float]:
    return [entry["validation_loss"] for entry in entries]
