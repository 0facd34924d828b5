"""Measure what Dagster costs.

    python bench/orchestration.py PROJECT      # a folder with finetune.yaml and a finished graph

Prints two tables: the time to load the code location, to start a step in each way, and to run the
whole graph with nothing to do. The figures are medians of --repeat runs. On a busy machine only
the ratios are reliable.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import load_project
from ft_assets.job import Job
from ft_assets.launchers.local import LocalLauncher

STEPS = 7


class EmptyStep(LocalLauncher):
    """A launcher with an empty child process.

    Its time is that of the launcher and of the start of Python.
    """

    def command(self, job_file: Path, job: Job) -> list[str]:
        write = "import sys; open(sys.argv[1], 'w').write('{\"metrics\": {}, \"parts\": {}}')"
        return [sys.executable, "-c", write, str(job.result_file)]


def chain(work: Callable[[Path], None]) -> list[dg.AssetsDefinition]:
    """Return a chain of STEPS assets: each needs the asset before it."""

    def asset(index: int) -> dg.AssetsDefinition:
        @dg.asset(name=f"step_{index}", deps=[f"step_{index - 1}"] if index else [])
        def step() -> None:
            with tempfile.TemporaryDirectory() as folder:
                work(Path(folder))

        return step

    return [asset(index) for index in range(STEPS)]


def empty_job(folder: Path) -> None:
    paths = {"output": folder / "out", "checkpoints": folder / "ckpt", "work": folder / "work"}
    job = Job(
        step="empty",
        asset="empty",
        partition=None,
        fingerprint="0" * 20,
        settings={},
        inputs={},
        **paths,
    )
    EmptyStep().run(job, lambda message: None)


QUIET: dict[str, Any] = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
nothing = dg.Definitions(chain(lambda folder: None), jobs=[dg.define_asset_job("chain")])
children = dg.Definitions(chain(empty_job), jobs=[dg.define_asset_job("chain")])


def nothing_job() -> dg.JobDefinition:
    return nothing.resolve_job_def("chain")


def timed(repeat: int, call: Callable[[], object]) -> float:
    """Return the median of the wall seconds of a call."""
    seconds = []
    for _ in range(repeat):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def command(arguments: list[str], cwd: Path) -> Callable[[], object]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("FT_CONFIG", "DAGSTER_HOME")
    }
    return lambda: subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, check=True, capture_output=True
    )


def multiprocess() -> None:
    with (
        dg.instance_for_test() as instance,
        dg.execute_job(
            dg.reconstructable(nothing_job),
            instance,
            run_config={**QUIET, "execution": {"config": {"multiprocess": {}}}},
        ) as done,
    ):
        assert done.success


def in_process(definitions: dg.Definitions) -> None:
    with dg.instance_for_test() as instance:
        assert (
            definitions.resolve_job_def("chain")
            .execute_in_process(QUIET, instance=instance)
            .success
        )


def made_in(folder: Path) -> float:
    """Return the seconds that the current artifacts of a project took."""
    project = load_project(folder / "finetune.yaml")
    store = ArtifactStore(project.store_path)
    total = 0.0
    for home in store.root.iterdir():
        for partition in (None, *project.base_models) if not home.name.startswith(".") else ():
            if (made := store.current(home.name, partition)) is not None:
                total += made.manifest.finished - made.manifest.started
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("project", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    asked.project = asked.project.resolve()
    bare = timed(asked.repeat, lambda: in_process(nothing))
    rows = {
        "import dagster": timed(asked.repeat, command(["-c", "import dagster"], asked.project)),
        "code location (import ft_assets.definitions)": timed(
            asked.repeat,
            command(["-c", "import ft_assets.definitions as it; it.defs()"], asked.project),
        ),
        "a step in process": bare / STEPS,
        "a step as a child process of the launcher": timed(
            asked.repeat, lambda: in_process(children)
        )
        / STEPS,
        "a step in Dagster's multiprocess executor": timed(max(1, asked.repeat // 3), multiprocess)
        / STEPS,
        "ft run with nothing to do": timed(
            max(1, asked.repeat // 2), command(["-m", "ft_assets.cli", "run"], asked.project)
        ),
    }
    work = made_in(asked.project)
    rows["making what is current took"] = work
    share = rows["ft run with nothing to do"] / (work + rows["ft run with nothing to do"])
    if asked.json:
        print(json.dumps({**rows, "orchestration_share": share}, indent=1))
        return
    print("| what | seconds |\n|---|---:|")
    for name, seconds in rows.items():
        print(f"| {name} | {seconds:.2f} |")
    print(
        f"\nOrchestration takes {share:.1%} of a run that makes everything: the time of a run with "
        "nothing to do, divided by the time of the steps."
    )


if __name__ == "__main__":
    main()
