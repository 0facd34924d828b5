"""Run many base models as a backfill, and count what is wrong at the end.

    python bench/backfill.py --models 50 --kills 2 --in-process

The script checks three things: the pool keeps its limit, every run ends in the right state, and a
killed daemon loses no run. It starts a real instance with webserver, daemon and run queue. Every
tenth base model has no weights, so its run must fail with the user's error. All others must end
with a merged model. The pool is sampled every half second. With `--in-process`, steps run inside
the process of their run instead of in a child process, which would start Python and import torch
six times per model. Each run is a process in both cases.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import yaml

from ft_assets.artifacts import ArtifactStore
from ft_assets_tests.factories import (
    SETTINGS,
    conversations,
    tiny_llama,
    tiny_tokenizer,
    write_jsonl,
)
from ft_assets_tests.launching import stop_services

LIMIT = 2
HOME = """
concurrency:
  pools: {default_limit: 2, granularity: op}
  runs: {max_concurrent_runs: 4}
telemetry: {enabled: false}
run_launcher: {module: ft_assets.runs, class: ProcessRunLauncher}
run_monitoring:
  enabled: true
  start_timeout_seconds: 120
  poll_interval_seconds: 10
  free_slots_after_run_end_seconds: 10
run_retries: {enabled: true, max_retries: 2, retry_on_asset_or_op_failure: false}
"""
IN_PROCESS = """
from ft_assets.definitions import build
from ft_assets.config import load_project
from ft_assets_tests.pipeline import InProcessLauncher

defs = build(load_project())
defs.resources["materializer"].launcher = InProcessLauncher()
"""
CHILDREN = "from ft_assets.definitions import defs  # noqa: F401\n"
LAUNCH = """
mutation($p: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $p) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}
"""


def write_model(folder: Path) -> None:
    """Write a random one-layer Llama with its tokenizer and template."""
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer, max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_project(folder: Path, models: int) -> list[str]:
    """Write a project that overrides every verdict; return its base models."""
    write_model(folder / "model")
    write_jsonl(folder / "data/train.jsonl", conversations(48, lambda _: "yes"))
    write_jsonl(folder / "data/retention.jsonl", conversations(4, lambda _: "no", start=2000))
    names = [f"model-{index:02d}" for index in range(models)]
    sources = {
        name: {"folder": "missing" if index % 10 == 9 else "model"}
        for index, name in enumerate(names)
    }
    settings: dict[str, Any] = {**SETTINGS, "base_models": sources}
    settings["data"] = {
        "train": ["data/train.jsonl"],
        "retention": ["data/retention.jsonl"],
        "heldout_share": 0.25,
    }
    settings["sft"] = {**SETTINGS["sft"], "max_steps": 2}
    settings["evaluation"] = {"max_new_tokens": 2, "retention_answers": 2}
    settings["gate"] = {
        **SETTINGS["gate"],
        "min_top1_agreement": 0.0,
        "override": "bench: what runs is asked, not how well",
    }
    (folder / "finetune.yaml").write_text(yaml.safe_dump(settings))
    return names


class Services:
    """The webserver and the daemon of a project, each in its own session."""

    def __init__(self, folder: Path, in_process: bool) -> None:
        self.folder, self.location = folder, folder / "location.py"
        self.location.write_text(IN_PROCESS if in_process else CHILDREN)
        home = folder / "home"
        home.mkdir()
        (home / "dagster.yaml").write_text(HOME)
        os.environ |= {
            "DAGSTER_HOME": str(home),
            "FT_CONFIG": str(folder / "finetune.yaml"),
            "OMP_NUM_THREADS": "1",
        }
        self.instance = dg.DagsterInstance.get()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.web = self._start("dagster_webserver", "-h", "127.0.0.1", "-p", str(self.port))
        self.daemon = self._start("dagster._daemon", "run")

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{module}.log").open("ab")
        line = [sys.executable, "-m", module, *arguments, "-f", str(self.location)]
        return subprocess.Popen(
            line, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )

    def kill_daemon(self) -> None:
        """Kill the daemon with SIGKILL, like a crash, and start a new daemon."""
        self.daemon.send_signal(signal.SIGKILL)
        self.daemon.wait()
        time.sleep(5)
        self.daemon = self._start("dagster._daemon", "run")

    def launch(self, names: list[str]) -> str:
        """Start a backfill of all assets over all base models, like the UI; return its id."""
        assets = [{"path": key.path} for key in self._keys()]
        body = {
            "query": LAUNCH,
            "variables": {"p": {"assetSelection": assets, "partitionNames": names, "tags": []}},
        }
        end = time.monotonic() + 180
        while time.monotonic() < end:
            try:
                answer = httpx.post(
                    f"http://127.0.0.1:{self.port}/graphql", json=body, timeout=120
                ).json()
                return answer["data"]["launchPartitionBackfill"]["backfillId"]
            except httpx.HTTPError:
                time.sleep(1)
        raise SystemExit("the webserver did not come up; its log lies beside the project")

    def _keys(self) -> list[dg.AssetKey]:
        from ft_assets.definitions import defs

        return sorted(defs().resolve_asset_graph().materializable_asset_keys)

    def stop(self) -> None:
        stop_services(self.daemon, self.web)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument("--minutes", type=float, default=120)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="backfill-"))
    names = write_project(folder, asked.models)
    services = Services(folder, asked.in_process)
    begun, most, kills, used = time.monotonic(), 0, 0, Counter[int]()
    try:
        backfill = services.launch(names)
        print(f"{folder}: backfill {backfill}", flush=True)
        while time.monotonic() - begun < asked.minutes * 60:
            info = services.instance.event_log_storage.get_concurrency_info("gpu")
            used[info.active_slot_count] += 1
            most = max(most, info.active_slot_count)
            runs = services.instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": backfill}))
            ended = sum(run.is_finished for run in runs)
            if (
                kills < asked.kills
                and ended >= (kills + 1) * len(names) // (asked.kills + 2)
                and info.active_slot_count
            ):
                services.kill_daemon()
                kills += 1
                print(
                    f"{time.monotonic() - begun:.0f} s: daemon killed, {ended} runs had ended",
                    flush=True,
                )
            status = services.instance.get_backfill(backfill)
            if status and not status.status.value.startswith(
                ("REQUESTED", "COMPLETING", "CANCELING", "FAILING")
            ):
                break
            time.sleep(0.5)
        report(services, folder, names, backfill, most, kills, used, time.monotonic() - begun)
    finally:
        services.stop()


def report(
    services: Services,
    folder: Path,
    names: list[str],
    backfill: str,
    most: int,
    kills: int,
    used: Counter[int],
    seconds: float,
) -> None:
    """Print the table. Exit with 1 if a base model is in the wrong state or a limit broke."""
    runs = services.instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": backfill}))
    store = ArtifactStore(folder / ".ft/store")
    merged = {name for name in names if store.current("merged_model", name) is not None}
    wanted = {name for index, name in enumerate(names) if index % 10 != 9}
    failed = {
        run.tags.get("dagster/partition")
        for run in runs
        if run.status == dg.DagsterRunStatus.FAILURE
    } - {None}
    status = services.instance.get_backfill(backfill)
    print("| what | found | expected |\n|---|---|---|")
    rows = [
        ("base models with a merged model", len(merged), len(wanted)),
        ("merged, of those that should", len(merged & wanted), len(wanted)),
        ("base models whose run failed", len(failed - merged), len(names) - len(wanted)),
        ("runs not ended", sum(not run.is_finished for run in runs), 0),
        ("daemon kills", kills, "–"),
        ("most steps in the pool at once", most, f"at most {LIMIT}"),
        ("samples of the pool (slots: count)", dict(sorted(used.items())), "–"),
        ("backfill", status.status.value if status else "?", "ended"),
        ("seconds", round(seconds), "–"),
    ]
    for name, found, expected in rows:
        print(f"| {name} | {found} | {expected} |")
    if merged != wanted or most > LIMIT or any(not run.is_finished for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
