"""Kill a step or a publication at a given point, by SIGKILL at a patched call.

`python -m ft_assets_tests.kill_points POINT CALL FOLDER` runs the work of `FOLDER/work.json`, and
kills itself at the CALL-th pass of POINT. POINT `none` runs to the end. The kill does not depend on
timing.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ft_assets_tests import servers

# Each point has a module, a dotted attribute, and `before` or `after` the call.
POINTS: dict[str, tuple[str, str, str]] = {
    "load": ("ft_assets.training.adapter", "load_base", "before"),
    "before the first step": ("transformers.trainer", "Trainer._inner_training_loop", "before"),
    "forward pass": ("trl.trainer.sft_trainer", "SFTTrainer.training_step", "before"),
    "forward pass of a pair": ("trl.trainer.dpo_trainer", "DPOTrainer.training_step", "before"),
    "mid-accumulation": ("accelerate.accelerator", "Accelerator.backward", "after"),
    "optimizer step": ("torch.optim.adamw", "AdamW.step", "after"),
    "checkpoint: weights written": ("transformers.trainer", "Trainer.save_model", "after"),
    "checkpoint: optimizer written": (
        "transformers.trainer",
        "Trainer._save_optimizer_and_scheduler",
        "after",
    ),
    "checkpoint: before its rename": ("ft_assets.training.checkpoints", "publish_folder", "before"),
    "checkpoint: after its rename": ("ft_assets.training.checkpoints", "rotate", "before"),
    "sampling": ("ft_assets.training.rl_trainer", "generate", "after"),
    "rewards of a step": ("ft_assets.training.rl_trainer", "Reward.of_groups", "after"),
    "validation": ("ft_assets.training.validation", "answer_losses", "before"),
    "best weights: before their rename": (
        "ft_assets.training.validation",
        "publish_folder",
        "before",
    ),
    "between epochs": ("transformers.trainer_callback", "CallbackHandler.on_epoch_end", "after"),
    "reference written": ("ft_assets.training.dpo", "write_reference", "after"),
    "final save": ("ft_assets.training.sft", "keep_events", "before"),
    "final save of a preference training": (
        "ft_assets.training.publish",
        "keep_events",
        "before",
    ),
    "manifest": ("ft_assets.artifacts.manifest", "file_sha256", "before"),
    "publish: before its rename": ("ft_assets.artifacts.store", "fsync_tree", "after"),
    "before CURRENT": ("ft_assets.artifacts.store", "ArtifactStore._point", "before"),
}


def arm(point: str, call: int) -> None:
    """Patch the call of a point so that this process dies there."""
    if point == "none":
        return
    module, path, when = POINTS[point]
    holder: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    real, seen = getattr(holder, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if seen == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, dying)


def work(folder: Path) -> None:
    """Train and publish like the graph: with a version, a staging folder and checkpoints."""
    from ft_assets.artifacts import ArtifactStore
    from ft_assets_tests import training

    settings = json.loads((folder / "work.json").read_text())
    store = ArtifactStore(folder / "store")
    kind = settings["kind"]
    version = "v" * 20
    if (known := store.find(kind, "tiny", version)) is not None:  # like the materializer
        store.make_current(known, "tiny")
        return
    train: Callable[..., dict[str, Any]] = getattr(training, f"{kind}_into")
    with store.staging(kind, "tiny") as staged:
        metrics = train(settings, store.checkpoints(kind, "tiny", version), staged)
        store.publish(
            staged,
            asset=kind,
            partition="tiny",
            version=version,
            code_version="1",
            settings={},
            inputs={},
            environment={},
            metrics=metrics,
            started=0.0,
        )


def run(point: str, call: int, folder: Path) -> int:
    """Run the work in a child process; return its exit code (-9: killed)."""
    done = servers.run_module(
        servers.step_server,
        "ft_assets_tests.kill_points",
        *(point, str(call), str(folder)),
        environment=servers.STEP_ENVIRONMENT,
        timeout=300,
    )
    (folder / f"log-{len(list(folder.glob('log-*')))}.txt").write_text(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    work(Path(sys.argv[3]))
