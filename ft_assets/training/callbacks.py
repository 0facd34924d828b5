"""Progress of a training: step, loss, tokens/s, memory and time left; and the loss curve.

A training that goes wrong is stopped here: a loss or gradient that is not finite, a loss that rises
for good.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from transformers import TrainerCallback

from ft_assets.errors import TrainingError
from ft_assets.hardware import peak_memory_gb
from ft_assets.job import Report
from ft_assets.training.distributed import world_size
from ft_assets.training.flops import mfu_percent
from ft_assets.training.memory_plan.model_shape import Shape

WINDOW = 10  # steps
# These go into the checkpoint's log, for a retry of a training that had already ended.
SPEED = ("tokens_per_s", "mfu_percent")
SHOWN = {  # values of TRL's log, and their names in the curve
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "rewards/margins": "reward_margins",
    "rewards/accuracies": "reward_accuracies",
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "alike_groups",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "answer_tokens",
    "completions/clipped_ratio": "unfinished",
}


class SpeedMetrics(TypedDict, total=False):
    """Tokens/s of all ranks, and the share of the GPU's peak FLOP/s in percent, if known."""

    tokens_per_s: float
    mfu_percent: float


def device_memory_gb() -> float:
    """Return peak memory in GB: of the GPU's allocator if there is a GPU, else of the process."""
    return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else peak_memory_gb()


def gpu_name() -> str | None:
    """Return the name of this process' GPU, or None without a GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def mfu_from_speed(
    shape: Shape, full: bool, computed: float = 1.0
) -> Callable[[float], float | None]:
    """Return a function that converts the tokens/s of all ranks to MFU in percent.

    The function returns None if the GPU's peak is not known. `computed`: the share of the counted
    tokens that pass through the model.
    """
    gpu = gpu_name()
    return lambda speed: (
        mfu_percent(speed * computed / world_size(), shape, gpu, full) if gpu else None
    )


class Progress(TrainerCallback):
    """Report each step and keep the loss curve.

    Raises TrainingError if a loss or gradient is not finite, or if the mean of ten steps is more
    than `max_loss_rise` above the lowest earlier mean of ten steps. `tokens_per_step`: None in RL,
    whose tokens TRL counts. `mfu` converts tokens/s to MFU in percent, or returns None.
    """

    def __init__(
        self,
        report: Report,
        tokens_per_step: float | None,
        max_loss_rise: float | None = None,
        mfu: Callable[[float], float | None] = lambda _: None,
    ) -> None:
        self.report = report
        self.tokens_per_step = tokens_per_step
        self.max_loss_rise = max_loss_rise
        self.mfu = mfu
        self.curve: list[dict[str, float]] = []
        self._begun = 0.0
        self._first = 0
        self._seen = 0  # tokens that TRL has counted

    def restore(self, state: Any) -> None:
        """Take over the curve of a run that had already reached its last step."""
        if not self.curve:
            self.curve = [_entry(entry) for entry in state.log_history if "loss" in entry]

    def speed(self) -> SpeedMetrics:
        """Return the speed at the last step; a value that is not known is absent."""
        last = self.curve[-1]
        speed = SpeedMetrics()
        if "tokens_per_s" in last:
            speed["tokens_per_s"] = last["tokens_per_s"]
        if "mfu_percent" in last:
            speed["mfu_percent"] = last["mfu_percent"]
        return speed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()
        self._first = state.global_step
        self._seen = state.num_input_tokens_seen
        self.curve = [_entry(entry) for entry in state.log_history if "loss" in entry]

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        self._refuse_nonsense(state.global_step, logs)
        numbers = self._numbers(state, logs)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update({name: numbers[name] for name in SPEED if name in numbers})
        self.curve.append(dict(numbers))
        self._refuse_divergence(state.global_step)
        self.report("train", **numbers)

    def _numbers(self, state: Any, logs: dict[str, float]) -> dict[str, float]:
        done = max(1, state.global_step - self._first)
        elapsed = time.perf_counter() - self._begun
        numbers = {
            **_entry({**logs, "step": state.global_step}),
            "steps": state.max_steps,
            "memory_gb": round(device_memory_gb(), 2),
            "seconds_left": round(elapsed / done * (state.max_steps - state.global_step)),
        }
        if self.tokens_per_step is None:
            speed = (logs["num_tokens"] - self._seen) / elapsed
        else:
            speed = self.tokens_per_step * done / elapsed
        numbers["tokens_per_s"] = round(speed, 1)
        mfu = self.mfu(speed)
        if mfu is not None:
            numbers["mfu_percent"] = mfu
        return numbers

    def _refuse_nonsense(self, step: int, logs: dict[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(float(logs[name])):
                shown = "loss" if name == "loss" else "gradient"
                raise TrainingError(
                    where=f"step {step}",
                    found=f"the {shown} is {float(logs[name])}",
                    expected="a finite loss and a finite gradient",
                    fix="lower learning_rate or inspect the rows of this step; the checkpoint "
                    "before it is kept",
                )

    def _refuse_divergence(self, step: int) -> None:
        losses = [entry["loss"] for entry in self.curve]
        if self.max_loss_rise is None or len(losses) < 2 * WINDOW:
            return
        now = statistics.fmean(losses[-WINDOW:])
        lowest = min(
            statistics.fmean(losses[begin : begin + WINDOW])
            for begin in range(len(losses) - 2 * WINDOW + 1)
        )
        if now - lowest > self.max_loss_rise:
            raise TrainingError(
                where=f"step {step}",
                found=f"training diverges: the loss of the last {WINDOW} steps is {now:.2f} and "
                f"was {lowest:.2f}",
                expected=f"a rise of at most max_loss_rise ({self.max_loss_rise})",
                fix="lower learning_rate, warm up longer, or raise max_loss_rise; the checkpoint "
                "before it is kept",
            )


def _entry(logs: dict[str, float]) -> dict[str, float]:
    """Return a step of the curve: its number, its loss in nats, other values of TRL's log."""
    shown = {
        name: round(float(logs[key]), 4) for key, name in SHOWN.items() if logs.get(key) is not None
    }
    if "learning_rate" in shown:
        shown["learning_rate"] = float(logs["learning_rate"])
    return {
        "step": logs["step"],
        "loss": round(float(logs["loss"]), 4),
        **shown,
        **{name: logs[name] for name in SPEED if name in logs},
    }
