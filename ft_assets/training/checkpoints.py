"""Complete checkpoints or none.

A checkpoint is written to a staging folder, fsynced and renamed. It is read only if every file is
as it was written, by its SHA-256. Not here: when a checkpoint is written (`save_steps`), and how
training resumes from it (loop.py).
"""

import errno
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import Trainer

from ft_assets.artifacts.checkpoint_files import damage, list_files
from ft_assets.artifacts.disk import fsync_tree, replace
from ft_assets.errors import ArtifactError, TrainingError
from ft_assets.job import Report
from ft_assets.models.sharding import is_sharded

WRITING = ".writing"
KEPT = 2  # checkpoints
# The words of torch.save and safetensors for the operating system's ENOSPC.
FULL = ("No space left", "PytorchStreamWriter failed", "inline_container.cc", "iostream error")


class WholeCheckpoints(Trainer):
    """Mixin before a TRL trainer: a checkpoint gets its name when all of it is on the disk.

    Raises TrainingError instead of writing weights that are not finite, and ArtifactError when the
    disk is full. Earlier checkpoints stay.
    """

    _writing = False

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Leave a sharded base where it is: its weights cannot be moved."""
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: our card belongs to the merged model."""

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / WRITING) if self._writing else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._refuse_unsound(model)
        home = Path(super()._get_output_dir(trial))
        staged = home / WRITING / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(home / WRITING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_folder(staged, home / staged.name)
                rotate(home)
        except Exception as error:
            if not disk_is_full(error):
                raise
            shutil.rmtree(home / WRITING, ignore_errors=True)
            raise full_disk(home, f"the checkpoint of step {self.state.global_step}") from error
        finally:
            self._writing = False

    def _refuse_unsound(self, model: Any) -> None:
        unsound = [
            name
            for name, weight in model.named_parameters()
            if weight.requires_grad and not torch.isfinite(weight).all()
        ]
        if unsound:
            raise TrainingError(
                where=f"step {self.state.global_step}",
                found=f"{len(unsound)} trained weights are not finite, e.g. {unsound[0]}",
                expected="finite weights",
                fix="lower learning_rate or max_grad_norm; the checkpoint before it is kept",
            )


def disk_is_full(error: BaseException) -> bool:
    """Return True if a write failed because the disk is full.

    safetensors and torch.save raise errors of their own for it.
    """
    chain: BaseException | None = error
    while chain is not None:
        words = str(chain)
        if getattr(chain, "errno", None) == errno.ENOSPC or any(full in words for full in FULL):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def full_disk(folder: Path, what: str) -> ArtifactError:
    """Return the error of a file (`what`) that could not be written for want of space."""
    return ArtifactError(
        where=str(folder),
        found=f"the disk is full: {what} could not be written",
        expected="free space for the file",
        fix="free some space, or set store: to another disk; a rerun continues from the checkpoint "
        "before it",
    )


def publish_folder(staged: Path, final: Path) -> None:
    """List the files of a staged folder with their hashes, fsync all of it, and rename it."""
    list_files(staged)
    fsync_tree(staged)
    replace(staged, final)  # a damaged one of an earlier try may be there


def rotate(home: Path) -> None:
    """Delete all checkpoints but the newest two: the second is used if the newest gets damaged."""
    for old in _by_step(home)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _by_step(home: Path) -> list[Path]:
    found = [
        path
        for path in home.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path | None) -> int:
    """Return the number of optimizer steps that a checkpoint holds; 0 for None."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def last_whole(home: Path, report: Report) -> Path | None:
    """Return the newest whole checkpoint, or None. Damaged ones are reported and deleted."""
    for checkpoint in reversed(_by_step(home)):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        report(f"{checkpoint.name} is not resumed from: {wrong}", step=step_of(checkpoint))
        shutil.rmtree(checkpoint, ignore_errors=True)  # every rank does this
    return None
