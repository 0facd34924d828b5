"""Heavy steps as jobs of a Slurm cluster, by its own command-line tools.

Why not dagster-slurm: it packs environments and sends them over SSH, and lets jobs outlive the run that asked for them.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ft_assets.config.launcher import SlurmSettings
from ft_assets.errors import ConfigError, nearest
from ft_assets.job import Job
from ft_assets.launchers.base import TEMPORARY, TRAINING_STEPS
from ft_assets.launchers.cluster import ClusterLauncher, NoAnswer, Seen, unique_name

ANSWER_SECONDS = 60.0
CLOSE_SECONDS = 60.0  # Slurm kills what has not ended KillWait (30) seconds after TERM

# Arguments: python, job file, silence. The port is looked for on the first node, where rank 0 will listen. srun does not take
# cpus-per-task from its job, and with `sbatch --export` would pass on no more than that names.
SCRIPT = """#!/bin/sh
MASTER_PORT="$("$1" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')" || exit
export MASTER_PORT
exec srun --kill-on-bad-exit=1 --export=ALL ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \\
  "$1" -m ft_assets.launchers.node "$2" "$3"
"""

SILENT = re.compile(
    r"Unable to contact slurm controller|timed out|Connection refused|Communication connection failure|try again",
    re.I,
)
UNKNOWN = re.compile(r"Invalid job id", re.I)
# What sbatch refuses -> the key that asked for it.
REFUSED = (
    (
        re.compile(r"account", re.I),
        "account",
    ),  # before the partition: "Invalid account or account/partition combination"
    (re.compile(r"partition", re.I), "partition"),
    (re.compile(r"time limit|--time", re.I), "time"),
    (re.compile(r"gres|gpu|generic resource", re.I), "gpus"),
    (re.compile(r"node (count|configuration)", re.I), "nodes"),
    (
        re.compile(r"option|qos|constraint|feature|reservation|licen[sc]e|memory|dependency", re.I),
        "sbatch",
    ),
)
# A job that waits for this waits for ever, where a cluster does not refuse it at once -> the key that asked for it.
NEVER = {
    "PartitionConfig": "partition",  # it allows fewer nodes or less time
    "PartitionTimeLimit": "time",
    "AccountNotAllowed": "account",
    "InvalidAccount": "account",
    "InvalidQOS": "sbatch",
    "QOSNotAllowed": "sbatch",
    "BadConstraints": "sbatch",
    "DependencyNeverSatisfied": "sbatch",
}
WAITING = frozenset(
    {
        "PENDING",
        "CONFIGURING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "SPECIAL_EXIT",
        "RESV_DEL_HOLD",
    }
)
RUNNING = frozenset(
    {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
)
# Not the step's doing; CANCELLED is seen only when somebody else did it.
LOST = frozenset(
    {
        "NODE_FAIL",
        "BOOT_FAIL",
        "PREEMPTED",
        "REVOKED",
        "CANCELLED",
        "LAUNCH_FAILED",
        "RECONFIG_FAIL",
    }
)


class SlurmLauncher(ClusterLauncher):
    """Training steps run as `ranks_per_node` tasks on each of `nodes`, evaluation, merge, release and export as one."""

    def __init__(self, settings: SlurmSettings) -> None:
        super().__init__(settings)
        self.settings = settings

    def submit(self, job: Job, job_file: Path) -> str:
        script = job.work / "slurm.sh"
        script.write_text(SCRIPT)
        arguments = [
            str(script),
            self.settings.python or sys.executable,
            str(job_file),
            str(self.settings.silence_seconds),
        ]
        done = _tool(["sbatch", "--parsable", *self.options(job), *arguments])
        if done.returncode:
            said = done.stderr.strip() or f"sbatch ended with exit code {done.returncode}"
            if SILENT.search(said):
                raise NoAnswer(said)
            raise _refused(said, self.settings)
        return done.stdout.strip().partition(";")[
            0
        ]  # behind it the name of the cluster, where there are several

    def options(self, job: Job) -> list[str]:
        """Return the options of sbatch; those of `launcher.sbatch` come last, where sbatch lets them win."""
        training = job.step in TRAINING_STEPS
        gpus = self.settings.gpus if training else min(1, self.settings.gpus)
        options: dict[str, str | int | float | bool] = {
            "job-name": unique_name(job),
            "dependency": "singleton",
            "no-requeue": True,  # tries are the graph's affair
            "output": str(job.log_file).replace("%", "%%"),
            "open-mode": "append",
            "nodes": self.settings.nodes if training else 1,
            "ntasks-per-node": self.settings.ranks_per_node if training else 1,
        }
        options |= {
            key: value
            for key in ("partition", "account", "time")
            if (value := getattr(self.settings, key)) is not None
        }
        if self.settings.gres or gpus:
            options["gres"] = self.settings.gres or f"gpu:{gpus}"
        options |= self.settings.sbatch
        return [
            f"--{key}" if value is True else f"--{key}={value}"
            for key, value in options.items()
            if value is not False
        ]

    def look(self, name: str) -> Seen:
        return seen(*_state(name), self.settings)

    def close(self, name: str, job: Job) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        if _state(name)[0] in WAITING | RUNNING:
            _tool(["scancel", name])
        while _state(name)[0] in WAITING | RUNNING and time.monotonic() < deadline:
            time.sleep(min(1.0, self.settings.poll_seconds))

    def greet(self) -> str:
        done = _tool(["sinfo", "--noheader", "--format=%R"])
        if done.returncode:
            raise NoAnswer(done.stderr.strip())
        known = sorted(set(done.stdout.split()))
        if (wanted := self.settings.partition) and not set(wanted.split(",")) <= set(known):
            raise ConfigError(
                where=f"launcher.partition: {wanted}",
                found="is not known to the cluster",
                expected=", ".join(known),
                fix=nearest(wanted, known),
            )
        return f"partitions {', '.join(known)}"


def seen(state: str, reason: str, code: int, settings: SlurmSettings) -> Seen:
    """Return what a state of Slurm means. Raises ConfigError for a job that can never start, or whose time limit was too short."""
    if state in WAITING and reason in NEVER:
        raise _unfit(NEVER[reason], f"the job can never start ({reason})", settings)
    if state in WAITING:
        return Seen("waiting", reason)
    if state in RUNNING:
        return Seen("running", state.lower())
    if state == "COMPLETED":
        return Seen("ended")
    if state in ("TIMEOUT", "DEADLINE"):
        raise ConfigError(
            where=f"launcher.time: {settings.time or 'the default of the partition'}",
            found=f"the job reached its time limit ({state})",
            expected="enough time for the step",
            fix="raise it; a training goes on from its last checkpoint",
        )
    if state == "OUT_OF_MEMORY":
        return Seen(
            "ended",
            "was killed for want of memory on its node (launcher.sbatch: {mem: …} asks for more)",
            -9,
        )
    if state in LOST:
        return Seen("ended", f"was ended by the cluster ({state})", TEMPORARY)
    if state == "FAILED" and code:
        return Seen("ended", "", code)
    return Seen("ended", f"ended as {state} ({reason})", code or 1)


def _state(name: str) -> tuple[str, str, int]:
    """Return state, reason and exit code (negative: a signal). Raises NoAnswer."""
    done = _tool(["scontrol", "show", "job", "--oneliner", name])
    if done.returncode == 0 and (state := re.search(r"\bJobState=(\w+)", done.stdout)):
        reason = re.search(r"\bReason=(\S+)", done.stdout)
        code = re.search(r"\bExitCode=(\d+):(\d+)", done.stdout)
        return state[1], reason[1] if reason else "", _code(code[1], code[2]) if code else 0
    if not UNKNOWN.search(done.stderr):
        raise NoAnswer(done.stderr.strip() or "scontrol said nothing")
    # Some minutes after its end only the accounting knows a job, where there is one.
    done = _tool(
        [
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            "--format=State,ExitCode",
            "--jobs",
            name,
        ]
    )
    if done.returncode == 0 and (row := re.match(r"(\w+)[^|]*\|(\d+):(\d+)", done.stdout)):
        return row[1], "", _code(row[2], row[3])
    return "REVOKED", "", 0


def _code(code: str, signal: str) -> int:
    return -int(signal) if int(signal) else int(code)


def _tool(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a tool of Slurm. Raises ConfigError if it is not installed, NoAnswer if it hangs."""
    name = command[0]
    if shutil.which(name) is None:
        raise ConfigError(
            where="launcher: slurm",
            found=f"there is no {name} on this machine",
            expected="Slurm's command-line tools",
            fix="run on a login node, or install them (Debian: slurm-client)",
        )
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{name} did not answer within {ANSWER_SECONDS:.0f} s") from None


def _refused(said: str, settings: SlurmSettings) -> ConfigError:
    key = next((key for pattern, key in REFUSED if pattern.search(said)), None)
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in said.splitlines()]
    return _unfit(key, f"sbatch refuses the job: {'; '.join(lines)}", settings)


def _unfit(key: str | None, found: str, settings: SlurmSettings) -> ConfigError:
    value = getattr(settings, key) if key else None
    where = (
        "launcher: slurm"
        if key is None
        else f"launcher.{key}" + ("" if value is None else f": {value}")
    )
    asked = {
        name: value
        for name in ("partition", "nodes", "time", "gpus")
        if (value := getattr(settings, name)) is not None
    }
    return ConfigError(
        where=where,
        found=found,
        expected=f"what this cluster offers; asked for: {asked}",
        fix="sinfo and sacctmgr show it",
    )
