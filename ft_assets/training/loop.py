"""Train to the end: from the last whole checkpoint, through interrupts, and with smaller micro-batches when memory runs out.

Everything that a resume needs is in a checkpoint or follows from the seed: weights, optimizer, schedule, random numbers,
the place in the data. On a CPU the result is bitwise that of a run that nobody disturbed.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from ft_assets.compat.transformers import load_checkpoint_weights, save_checkpoint
from ft_assets.errors import TrainingError
from ft_assets.job import Report
from ft_assets.training.checkpoints import last_whole, step_of
from ft_assets.training.distributed import world_size
from ft_assets.training.interrupt import Interrupt
from ft_assets.training.linears import groups

Build = Callable[
    [int, list[TrainerCallback]], Any
]  # (micro-batch, callbacks) -> a trainer on the same model


@dataclass(frozen=True)
class Run:
    """What came of it: the trainer after its last step, and what is said in the metrics."""

    trainer: Any
    resumed_from_step: int
    micro_batch: int
    out_of_memory: int

    def facts(self) -> dict[str, int]:
        """Return the metrics: where it was resumed, with which micro-batch it ended, how often memory ran out."""
        return {
            "resumed_from_step": self.resumed_from_step,
            "micro_batch": self.micro_batch,
            "out_of_memory": self.out_of_memory,
        }


class _Midway(TrainerCallback):
    """Knows whether the optimizer is writing into the weights right now."""

    inside = False

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.inside = True

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.inside = False


def train_to_the_end(
    build: Build,
    micro_batch: int,
    effective_batch: int,
    checkpoints: Path,
    report: Report,
    key: str,
) -> Run:
    """Train and return the run. `build` is called again with a smaller micro-batch after each torch.OutOfMemoryError; the
    effective batch, and so the rows of every step, stay. Raises TrainingError when that cannot help."""
    first, times = None, 0
    while True:
        interrupt, midway = Interrupt(), _Midway()
        trainer = build(micro_batch, [interrupt, midway])
        checkpoint = last_whole(checkpoints, report)
        first = step_of(checkpoint) if first is None else first
        if checkpoint is not None:
            report("resumed", step=step_of(checkpoint))
        try:
            with interrupt.listening():
                _train(trainer, checkpoint)
            return Run(trainer, first, micro_batch, times)
        except torch.OutOfMemoryError as error:
            said = str(error).split("\n")[0].partition(". ")[0]
            error.__traceback__ = None  # its frames hold the activations
        finally:
            for group in groups(trainer.model):
                group.forget()
        if (
            micro_batch == 1 or midway.inside or world_size() > 1
        ):  # other ranks wait in the middle of this step
            raise TrainingError(
                where=f"{key}: step {trainer.state.global_step + 1}",
                found=f"{_what(midway.inside, micro_batch)} does not fit into memory ({said})",
                expected="room for it",
                fix=f"lower {key}.micro_batch or chat.max_length, set gradient_checkpointing: true, or lora.method: qlora",
            )
        times, micro_batch = (
            times + 1,
            max(size for size in range(1, micro_batch // 2 + 1) if effective_batch % size == 0),
        )
        _keep(trainer, step_of(checkpoint))
        report(
            "out of memory: smaller micro-batch, more accumulation, same effective batch",
            step=trainer.state.global_step,
            micro_batch=micro_batch,
        )
        del trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _what(in_the_optimizer: bool, micro_batch: int) -> str:
    if in_the_optimizer:
        return "the optimizer"
    return (
        "one row at a time"
        if micro_batch == 1
        else f"a micro-batch of {micro_batch} on {world_size()} ranks"
    )


def _train(trainer: Any, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if (
            state.global_step >= state.max_steps
        ):  # it was done; transformers would train on to the end of the epoch
            load_checkpoint_weights(trainer, checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _keep(trainer: Any, resumed: int) -> None:
    """Write a checkpoint of the last whole step, unless there is one."""
    trainer.model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if trainer.state.global_step > resumed:
        save_checkpoint(trainer)
