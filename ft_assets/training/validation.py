"""The loss of the validation slice during SFT or DPO.

It decides which weights are kept, and when training stops early. The validation slice is cut from
the training rows (or pairs). The held-out rows, which the verdict is about, are never used here.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from transformers import TrainerCallback

from ft_assets.artifacts.checkpoint_files import damage
from ft_assets.config import TrainSettings
from ft_assets.errors import TrainingError
from ft_assets.inference.losses import answer_losses
from ft_assets.job import Report
from ft_assets.models.adapter_files import copy_trained
from ft_assets.rows.types import TokenSequence
from ft_assets.training.adapter import save_trained
from ft_assets.training.checkpoints import WholeCheckpoints, disk_is_full, full_disk, publish_folder
from ft_assets.training.memory_plan.plan import Plan
from ft_assets.training.out_of_memory import release
from ft_assets.training.precision import autocast_if_mixed

# model -> "validation_loss", and other measurements of the slice
Measure = Callable[[Any], dict[str, float]]


class ValidationMetrics(TypedDict):
    """The step whose weights are kept, the reason, and the measurements of that step."""

    kept_why: str
    kept_step: NotRequired[int]
    validation_loss: NotRequired[float]
    validation_accuracy: NotRequired[float]
    validation_margin: NotRequired[float]
    stopped_early: NotRequired[bool]


class LogsValidation(WholeCheckpoints):
    """Mixin before a TRL trainer: complete checkpoints, and the validation loss for trackers.

    Trackers (report_to) get the validation loss with the step after which it was measured.
    """

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        taken = [
            entry
            for entry in self.state.log_history[-2:]
            if "validation_loss" in entry and entry["step"] == self.state.global_step
        ]
        if taken:
            logs = {**logs, "eval_loss": taken[0]["validation_loss"]}
        super().log(dict(logs), start_time)


class Validation(TrainerCallback):
    """Measure the validation loss before the first step, after each epoch and after the last step.

    With `eval_steps` it is measured every so many steps instead of after each epoch. `losses` holds
    {"epoch", "step", "validation_loss", ...} as `measure` returns them; a resumed run keeps them.
    With `keep: best` the weights of the lowest loss are in `<folder>/best-<step>` until they are
    published.

    `measure`: None if there is nothing to measure; `unmeasured_reason` then ends the sentence that
    gives the reason. `key`: the section of the settings (sft, dpo).
    """

    def __init__(
        self,
        measure: Measure | None,
        settings: TrainSettings,
        key: str,
        folder: Path,
        report: Report,
        unmeasured_reason: str = "",
    ) -> None:
        self.measure = measure
        self.settings = settings
        self.key = key
        self.folder = folder
        self.report = report
        self.unmeasured_reason = unmeasured_reason
        self.losses: list[dict[str, float]] = []
        self.stopped_early = False

    @property
    def best(self) -> dict[str, float] | None:
        """The measurement with the lowest loss after the first step, or None without rows.

        The first one of equal losses.
        """
        trained = [entry for entry in self.losses if entry["step"] > 0]
        return min(trained, key=lambda entry: entry["validation_loss"], default=None)

    def best_weights(self) -> Path | None:
        """Return the folder of the best weights, or None if the last step's weights are kept."""
        if (
            self.settings.keep == "last"
            or self.best is None
            or self.best["step"] == self.losses[-1]["step"]
        ):
            return None
        return self.folder / f"best-{self.best['step']}"

    def curve(self) -> list[dict[str, float | bool]]:
        """Return the measurements; the one of the kept weights has "kept": True."""
        kept = self.losses[-1] if self.settings.keep == "last" and self.losses else self.best
        return [{**entry, "kept": True} if entry is kept else {**entry} for entry in self.losses]

    def metrics(self) -> ValidationMetrics:
        """Return the kept step and the reason for it."""
        if self.best is None:
            reason = "the last step: no validation loss was measured" + self.unmeasured_reason
            return {"kept_why": reason}
        by_loss = self.settings.keep == "best"
        kept = self.best if by_loss else self.losses[-1]
        metrics: ValidationMetrics = {
            "kept_step": int(kept["step"]),
            "kept_why": "the lowest validation loss" if by_loss else f"{self.key}.keep is last",
            "validation_loss": kept["validation_loss"],
        }
        if "validation_accuracy" in kept:
            metrics["validation_accuracy"] = kept["validation_accuracy"]
        if "validation_margin" in kept:
            metrics["validation_margin"] = kept["validation_margin"]
        metrics["stopped_early"] = self.stopped_early
        return metrics

    def restore(self, state: Any) -> None:
        """Take over the measurements of a resumed run."""
        self.losses = [entry for entry in state.log_history if "validation_loss" in entry]
        self.stopped_early = self._patience_is_over()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.restore(state)
        if self.measure and not self.losses:
            self._record(model, state)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        # Before the step's checkpoint is written, so that a resume from it has this measurement.
        last = state.global_step >= state.max_steps
        if not self.measure or not (self._is_due(state) or last):
            return
        self._record(model, state)
        is_best = self.best is not None and self.best["step"] == state.global_step
        if args.should_save and self.settings.keep == "best" and is_best and not last:
            self._save_best(model, state.global_step)
        if self._patience_is_over() and not last:
            self._stop(state, control)

    def _is_due(self, state: Any) -> bool:
        if self.settings.eval_steps:
            return state.global_step % self.settings.eval_steps == 0
        return float(state.epoch).is_integer()

    def _stop(self, state: Any, control: Any) -> None:
        self.stopped_early = True
        # A resume from this step's checkpoint sees that it was the last step.
        state.max_steps = state.global_step
        control.should_training_stop = control.should_save = True
        self.report(
            "stopped early",
            step=state.global_step,
            best_step=self.best["step"] if self.best else 0,
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Delete the weights that were the best before: no checkpoint leads back to them."""
        for old in self.folder.glob("best-*") if args.should_save else ():
            if self.best is None or old.name != f"best-{self.best['step']}":
                shutil.rmtree(old, ignore_errors=True)

    def _patience_is_over(self) -> bool:
        """Return True if the loss fell by less than `min_delta` in `patience` measurements."""
        rule = self.settings.early_stopping
        if rule is None or len(self.losses) <= rule.patience:
            return False
        losses = [entry["validation_loss"] for entry in self.losses]
        fell = min(losses[: -rule.patience]) - min(losses[-rule.patience :])
        return fell <= 0 or fell < rule.min_delta

    def _record(self, model: Any, state: Any) -> None:
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
        except torch.OutOfMemoryError as error:
            reason = release(error)
        # A smaller micro-batch of the training would not help.
        raise TrainingError(
            where=f"{self.key}: validation loss",
            found=f"a row of the validation slice does not fit into memory ({reason})",
            expected="memory for one row of the validation slice",
            fix="lower chat.max_length, or set lora.method: qlora or data.validation_share: 0",
        )

    def _save_best(self, model: Any, step: int) -> None:
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


def answer_loss(rows: Sequence[TokenSequence], plan: Plan, pad: int) -> Measure | None:
    """Return a function that measures the mean loss of tokenized rows, None without rows.

    The loss is in nats per token: the mean over the rows of each row's mean. The function scores as
    many rows and tokens at once as the plan has found memory for with gradients.
    """

    def measure(model: Any) -> dict[str, float]:
        training = model.training
        scored: list[Any] = list(rows)
        with autocast_if_mixed(model):
            losses, _ = answer_losses(model, scored, plan.micro_batch, pad, plan.largest)
        model.train(training)
        return {"validation_loss": sum(losses) / len(losses)}

    return measure if rows else None


def save_result(model: Any, watch: Validation, curve: list[dict[str, float]], output: Path) -> None:
    """Write the kept weights to `output`, and the curves of the training to its `info`."""
    best = watch.best_weights()
    if best is not None:
        if (wrong := damage(best)) is not None:
            raise TrainingError(
                where=str(best),
                found=f"the best weights are damaged: {wrong}",
                expected="the weights as they were written",
                fix=f"delete {best.parent}; the next run trains again from the first step",
            )
        copy_trained(best, output)
    else:
        save_trained(model, output)
    (output / "info").mkdir(exist_ok=True)
    (output / "info" / "curve.json").write_text(json.dumps(curve))
    (output / "info" / "validation.json").write_text(json.dumps(watch.curve()))
