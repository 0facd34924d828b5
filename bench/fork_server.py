"""Measure what the fork server saves: the SFT step of a finished project, fresh and forked.

    python bench/fork_server.py PROJECT BASE_MODEL [--repeat 3] [--set num_train_epochs=1]

Prints the seconds of the step in a fresh process, and in a process forked from a server that has
finished its imports. Exits with 1 if the two adapters differ in a single bit.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import yaml

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import Project, load_project
from ft_assets.job import Job
from ft_assets.launchers import LocalLauncher
from ft_assets.steps.sft import Settings


def sft_job(project: Project, base_model: str, folder: Path, changes: dict[str, object]) -> Job:
    """Return the SFT job of a base model, with its output in `folder`."""
    store = ArtifactStore(project.store_path)
    recipe = project.recipe(base_model)
    sft = recipe.sft.model_copy(update=changes)
    (folder / "output").mkdir(parents=True)
    return Job(
        step="sft",
        asset="lora_adapter",
        partition=base_model,
        fingerprint="0",
        settings=Settings(lora=recipe.lora, sft=sft).model_dump(mode="json"),
        inputs={
            name: store.need(name, base_model).path for name in ("base_model", "heldout_split")
        },
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        work=folder / "work",
        gpu=True,
    )


def seconds(job: Job, fresh: bool) -> float:
    """Run the job and return its seconds."""
    os.environ["FT_FRESH_STEPS"] = "1" if fresh else "0"
    begun = time.perf_counter()
    LocalLauncher().run(job, lambda line: None)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("project", type=Path)
    parser.add_argument("base_model")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], help="keys of sft, e.g. num_train_epochs=1")
    asked = parser.parse_args()
    project = load_project(asked.project.resolve() / "finetune.yaml")
    parts = [item.partition("=") for item in asked.set]
    changes = {key: yaml.safe_load(value) for key, _, value in parts}
    times: dict[bool, list[float]] = {True: [], False: []}
    adapters = set()
    with tempfile.TemporaryDirectory() as place:
        for number in range(asked.repeat + 1):
            for fresh in (True, False):
                folder = Path(place) / f"{number}-{fresh}"
                spent = seconds(sft_job(project, asked.base_model, folder, changes), fresh)
                adapters.add((folder / "output/adapter_model.safetensors").read_bytes())
                if number:  # the first round waits for the server's imports
                    times[fresh].append(spent)
    print("| SFT step | seconds, median |\n|---|---:|")
    for fresh, name in ((True, "fresh process"), (False, "forked process")):
        print(f"| {name} | {statistics.median(times[fresh]):.2f} |")
    same = len(adapters) == 1
    print(f"\nThe adapters are {'the same bits' if same else 'DIFFERENT'} in all runs.")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
