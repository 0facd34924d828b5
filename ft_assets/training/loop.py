"""Train to the last step, through interrupts and out-of-memory errors.

Training resumes from the last complete checkpoint. When memory runs out it continues with smaller
micro-batches. A checkpoint holds everything that a resume needs, or it follows from the seed:
weights, optimizer, schedule, random numbers, the place in the data. On a CPU the result is bitwise
that of a run without interrupts.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from ft_assets.compat.transformers import load_checkpoint_weights, save_checkpoint
from ft_assets.errors import TrainingError
from ft_assets.job import Report
from ft_assets.training.checkpoints import last_whole, step_of
from ft_assets.training.distributed import world_size
from ft_assets.training.interrupt import Interrupt
from ft_assets.training.linears import linear_groups
from ft_assets.training.out_of_memory import release

# (micro-batch, callbacks) -> a trainer on the same model
Build = Callable[[int, list[TrainerCallback]], Any]


class RunMetrics(TypedDict):
    """The step that the run resumed from, its last micro-batch, and how often memory ran out."""

    resumed_from_step: int
    micro_batch: int
    out_of_memory: int


@dataclass(frozen=True)
class Run:
    """The trainer after its last step, and the run's metrics."""

    trainer: Any
    metrics: RunMetrics


class _OptimizerStep(TrainerCallback):
    """`inside` is True while the optimizer writes into the weights."""

    inside = False

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.inside = True

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.inside = False


def train_to_the_end(
    build: Build,
    *,
    micro_batch: int,
    effective_batch: int,
    checkpoints: Path,
    report: Report,
    key: str,
) -> Run:
    """Train to the last step.

    After each torch.OutOfMemoryError `build` is called again with a smaller micro-batch. The
    effective batch, and so the rows of every step, stay. Raises TrainingError if a smaller
    micro-batch cannot help.
    """
    first: int | None = None
    times = 0
    while True:
        interrupt = Interrupt()
        optimizer_step = _OptimizerStep()
        trainer = build(micro_batch, [interrupt, optimizer_step])
        checkpoint = last_whole(checkpoints, report)
        first = step_of(checkpoint) if first is None else first
        if checkpoint is not None:
            report("resumed", step=step_of(checkpoint))
        try:
            with interrupt.handled():
                _train(trainer, checkpoint)
            return Run(
                trainer,
                RunMetrics(resumed_from_step=first, micro_batch=micro_batch, out_of_memory=times),
            )
        except torch.OutOfMemoryError as error:
            reason = release(error)
        except RuntimeError as error:
            if (refusal := _cannot_run(trainer, error, key)) is not None:
                raise refusal from error
            raise
        finally:
            for group in linear_groups(trainer.model):
                group.forget()
        # With several ranks, the others wait in the middle of this step.
        if micro_batch == 1 or optimizer_step.inside or world_size() > 1:
            what = _too_large(optimizer_step.inside, micro_batch)
            raise TrainingError(
                where=f"{key}: step {trainer.state.global_step + 1}",
                found=f"{what} does not fit into memory ({reason})",
                expected="memory for one micro-batch and the optimizer",
                fix=f"lower {key}.micro_batch or chat.max_length, set "
                f"{key}.gradient_checkpointing: true, or lora.method: qlora",
            )
        times += 1
        micro_batch = _smaller(micro_batch, effective_batch)
        _save_last_step(trainer, step_of(checkpoint))
        report(
            "out of memory: smaller micro-batch, more accumulation, same effective batch",
            step=trainer.state.global_step,
            micro_batch=micro_batch,
        )
        del trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _cannot_run(trainer: Any, error: RuntimeError, key: str) -> TrainingError | None:
    """Return the refusal of a model whose own code fails in the first step; None for a fault.

    Faults of a GPU or of another rank are classes of their own, or name CUDA.
    """
    if trainer.state.global_step or type(error) is not RuntimeError or "CUDA" in str(error):
        return None
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else None
    return TrainingError(
        where=f"{key}: the first step",
        found=f"{type(base or trainer.model).__name__} cannot be trained with these settings: "
        f"{str(error).splitlines()[0][:200]}",
        expected="a model whose layers take an adapter and mixed precision",
        fix="do what it asks for if it names a package; else name other layers in "
        "lora.target_modules, or another base",
    )


def _smaller(micro_batch: int, effective_batch: int) -> int:
    """Return the largest divisor of the effective batch up to half of the micro-batch."""
    return max(size for size in range(1, micro_batch // 2 + 1) if effective_batch % size == 0)


def _too_large(in_the_optimizer: bool, micro_batch: int) -> str:
    if in_the_optimizer:
        return "the optimizer"
    if micro_batch == 1:
        return "one row at a time"
    return f"a micro-batch of {micro_batch} on {world_size()} ranks"


def _train(trainer: Any, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        # transformers would train a finished run on to the end of its epoch.
        if state.global_step >= state.max_steps:
            load_checkpoint_weights(trainer, checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _save_last_step(trainer: Any, resumed: int) -> None:
    """Write a checkpoint of the last complete step, unless it has one."""
    trainer.model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if trainer.state.global_step > resumed:
        save_checkpoint(trainer)
