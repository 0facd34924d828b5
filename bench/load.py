"""Measure a project with many base models, and the statistics of many held-out rows.

    python bench/load.py partitions [200]    # code location, plan, status, gc, ticks of sensors
    python bench/load.py rows [50000]        # intervals and tests of as many rows, and the memory

`partitions` runs the graph of a tiny base once, and copies its versions to all other base models:
the same base has the same fingerprints, so that all are finished. Prints CPU seconds and wall
seconds: on a busy machine only the former, and ratios, are reliable.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ft_assets.evaluation.verdict.statistics import compare
from ft_assets_tests.factories import (
    SETTINGS,
    WORDS,
    conversations,
    make_tiny_model,
    next_word,
    write_jsonl,
)

FT = [sys.executable, "-m", "ft_assets.cli"]


def timed(label: str, work: Callable[[], Any]) -> Any:
    """Call `work`; print its CPU seconds (with those of its children) and its wall seconds."""

    def cpu() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    before, started = cpu(), time.perf_counter()
    result = work()
    print(f"{label:<44} {cpu() - before:8.1f} {time.perf_counter() - started:8.1f}", flush=True)
    return result


def call(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    return done.stdout


def name_of(index: int) -> str:
    return f"m{index:03}"


def project(folder: Path, count: int) -> None:
    """Write a project with `count` base models that are one tiny model."""
    make_tiny_model(folder / "tiny")
    write_jsonl(folder / "data/train.jsonl", conversations(120, lambda _: "yes"))
    write_jsonl(folder / "data/retention.jsonl", conversations(6, next_word, start=2000))
    write_jsonl(folder / "data/few_shot.jsonl", conversations(2, lambda _: "yes", start=3000))
    pairs = [
        {"prompt": f"what is {WORDS[index]}", "chosen": "yes", "rejected": "no no"}
        for index in range(16)
    ]
    write_jsonl(folder / "data/pairs.jsonl", pairs)
    bases = {name_of(index): {"folder": "tiny"} for index in range(count)}
    (folder / "finetune.yaml").write_text(yaml.safe_dump({"base_models": bases, **SETTINGS}))


def finish(folder: Path, count: int) -> None:
    """Run the graph for the first base model, and copy its versions to the others."""
    call(folder, *FT, "run", "--base", name_of(0))
    for source in sorted((folder / ".ft/store").glob(f"*/{name_of(0)}")):
        for index in range(1, count):
            target = source.with_name(name_of(index))
            shutil.copytree(source, target, dirs_exist_ok=True, copy_function=os.link)
            for path in target.glob("*/manifest.json"):
                manifest = {**json.loads(path.read_text()), "partition": name_of(index)}
                path.unlink()  # a link to the first one
                path.write_text(json.dumps(manifest))


def commands(folder: Path) -> None:
    """Time what a person and the daemon wait for."""
    load = [sys.executable, "-c", "import ft_assets.definitions as it; it.defs()"]
    timed("code location", lambda: call(folder, *load))
    timed("ft plan, all base models", lambda: call(folder, *FT, "plan"))
    timed("ft plan --base m000", lambda: call(folder, *FT, "plan", "--base", "m000"))
    timed("ft status", lambda: call(folder, *FT, "status"))
    timed("ft gc", lambda: call(folder, *FT, "gc"))
    for sensor in ("rerun_stale", "mark_stale"):
        timed(
            f"{sensor}, a tick", lambda name=sensor: call(folder, sys.executable, "-c", TICK, name)
        )


TICK = """
import sys
import dagster as dg
from ft_assets.definitions import defs
defs = defs()
sensor = defs.get_sensor_def(sys.argv[1])
cursor = None
with dg.DagsterInstance.ephemeral() as instance:
    for _ in range(2):  # the first tick waits until the data files are still
        context = dg.build_sensor_context(instance, cursor=cursor, definitions=defs)
        sensor(context)
        cursor = context.cursor
"""


def partitions(folder: Path, count: int) -> None:
    project(folder, count)
    timed("a first run and its copies", lambda: finish(folder, count))
    commands(folder)


def rows(_: Path, count: int) -> None:
    """Time the comparison of two candidates by 0/1 scores and by graded ones, alone and grouped."""
    chance = np.random.default_rng(0)
    pairs = [f"g{index // 2}" for index in range(count)]
    right = [(chance.random(count) < share).astype(float).tolist() for share in (0.5, 0.6)]
    graded = [np.clip(chance.normal(mean, 0.2, count), 0, 1).tolist() for mean in (0.5, 0.52)]
    for label, (rival, candidate) in (("right or wrong", right), ("graded", graded)):
        for kind, groups in (("", None), (", in pairs", pairs)):
            timed(
                f"{label}{kind}",
                lambda left=candidate, other=rival, keys=groups: compare(
                    left, other, 0.95, 0, groups=keys
                ),
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"peak memory {peak:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["partitions", "rows"])
    parser.add_argument("count", type=int, nargs="?")
    parser.add_argument("--folder", type=Path, help="keep the project there, and take it again")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        print(f"{'':<44} {'CPU s':>8} {'wall s':>8}")
        work, usual = {"partitions": (partitions, 200), "rows": (rows, 50_000)}[given.what]
        work(folder, given.count or usual)


if __name__ == "__main__":
    main()
