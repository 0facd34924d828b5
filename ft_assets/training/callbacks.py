"""What a person sees while it trains, and what is kept: step, loss, tokens/s, memory, time left; the loss curve."""

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback

from ft_assets.errors import TrainingError
from ft_assets.evaluation.losses import answer_losses
from ft_assets.job import Report
from ft_assets.steps._run import peak_memory_gb


def device_memory_gb() -> float:
    """Return peak memory in GB: of the GPU's allocator if there is one, else of the process."""
    return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else peak_memory_gb()


class Progress(TrainerCallback):
    """Reports each logged step and keeps the curve. Raises TrainingError on a loss that is not finite."""

    def __init__(self, report: Report, tokens_per_step: float) -> None:
        self.report, self.tokens_per_step = report, tokens_per_step
        self.curve: list[dict[str, float]] = []
        self._begun = 0.0
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun, self._first = time.perf_counter(), state.global_step
        if state.global_step:
            self.curve = [entry for entry in state.log_history if "loss" in entry]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {state.global_step}",
                f"the loss is {loss}",
                "a finite number",
                "lower learning_rate; the checkpoint before it is kept",
            )
        done = max(1, state.global_step - self._first)
        elapsed = time.perf_counter() - self._begun
        numbers = {
            "step": state.global_step,
            "steps": state.max_steps,
            "loss": round(loss, 4),
            "tokens_per_s": round(self.tokens_per_step * done / elapsed, 1),
            "memory_gb": round(device_memory_gb(), 2),
            "seconds_left": round(elapsed / done * (state.max_steps - state.global_step)),
        }
        numbers.update(
            {
                key.replace("rewards/", "reward_"): round(float(logs[key]), 4)
                for key in ("learning_rate", "grad_norm", "rewards/margins", "rewards/accuracies")
                if key in logs
            }
        )
        self.curve.append(dict(numbers))
        self.report("train", **numbers)


class Validation(TrainerCallback):
    """Takes the loss of the validation rows before the first step and after each epoch: where it turns, training overfits.

    Nothing is chosen by it. `losses` holds {"epoch", "step", "validation_loss"} in nats a token; a resumed run keeps them.
    """

    def __init__(self, rows: list[dict[str, Any]], batch_size: int, pad: int, report: Report) -> None:
        self.rows, self.batch_size, self.pad, self.report = rows, batch_size, pad, report
        self.losses: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.losses = [entry for entry in state.log_history if "validation_loss" in entry]
        if not self.losses:
            self._take(model, state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._take(model, state)

    def _take(self, model: Any, state: Any) -> None:
        if not self.rows:
            return
        training = model.training
        losses, _ = answer_losses(model, self.rows, self.batch_size, self.pad)
        model.train(training)
        entry = {"epoch": round(float(state.epoch or 0.0), 3), "step": state.global_step}
        entry["validation_loss"] = round(sum(losses) / len(losses), 4)
        self.losses.append(entry)
        state.log_history.append(entry)
        self.report("validation", **entry)
