"""Heavy steps as jobs of a Slurm cluster, through its own command-line tools.

Not dagster-slurm: it packs environments and sends them over SSH, and its jobs outlive their run.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ft_assets.config.launcher import SlurmSettings
from ft_assets.errors import ClusterUnreachable, ConfigError, nearest
from ft_assets.job import Job
from ft_assets.launchers.cluster import ClusterLauncher, JobState, Phase, unique_name

ANSWER_SECONDS = 60.0
CLEAN_UP_SECONDS = 60.0  # Slurm kills a job KillWait (30) seconds after TERM

# Arguments: python, job file, silence. The port is free on the first node, where rank 0 listens.
# srun does not inherit cpus-per-task from its job, and with `sbatch --export` it would pass on only
# the named variables.
FREE_PORT = 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
SCRIPT = f"""#!/bin/sh
MASTER_PORT="$("$1" -c '{FREE_PORT}')" || exit
export MASTER_PORT
exec srun --kill-on-bad-exit=1 --export=ALL \\
  ${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}} \\
  "$1" -m ft_assets.launchers.node "$2" "$3"
"""

UNREACHABLE = re.compile(
    r"Unable to contact slurm controller|timed out|Connection refused"
    r"|Communication connection failure|try again",
    re.IGNORECASE,
)
UNKNOWN_JOB = re.compile(r"Invalid job id", re.IGNORECASE)
# A refusal of sbatch -> the key that caused it. The account is before the partition: "Invalid
# account or account/partition combination".
REFUSED = tuple(
    (re.compile(pattern, re.IGNORECASE), key)
    for pattern, key in (
        (r"account", "account"),
        (r"partition", "partition"),
        (r"time limit|--time", "time"),
        (r"gres|gpu|generic resource", "gpus"),
        (r"node (count|configuration)", "nodes"),
        (
            r"option|qos|constraint|feature|reservation|licen[sc]e|memory|dependency",
            "sbatch",
        ),
    )
)
# A reason to wait that never ends, on a cluster that does not refuse such a job -> the key.
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
QUEUED = frozenset(
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
# Not the step's fault. CANCELLED appears only if another user cancelled the job.
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
    """Runs a training step as `ranks_per_node` tasks on each of `nodes`, and others as one task."""

    def __init__(self, settings: SlurmSettings, root: Path = Path()) -> None:
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
            message = done.stderr.strip() or f"sbatch ended with exit code {done.returncode}"
            if UNREACHABLE.search(message):
                raise ClusterUnreachable(message)
            raise _refused(message, self.settings)
        # With several clusters, the name of the cluster follows after a semicolon.
        return done.stdout.strip().partition(";")[0]

    def options(self, job: Job) -> list[str]:
        """Return the options of sbatch. Those of `launcher.sbatch` come last, so they win."""
        training = job.distributed
        gpus = self.settings.gpus if training else min(1, self.settings.gpus)
        options: dict[str, str | int | float | bool] = {
            "job-name": unique_name(job),
            "dependency": "singleton",
            "no-requeue": True,  # the graph handles retries
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

    def poll(self, name: str) -> JobState:
        return job_state(*_slurm_state(name), self.settings)

    def cancel_and_clean_up(self, name: str, job: Job) -> None:
        deadline = time.monotonic() + CLEAN_UP_SECONDS
        if _slurm_state(name)[0] in QUEUED | RUNNING:
            _tool(["scancel", name])
        while _slurm_state(name)[0] in QUEUED | RUNNING and time.monotonic() < deadline:
            time.sleep(min(1.0, self.settings.poll_seconds))

    def ping(self) -> str:
        done = _tool(["sinfo", "--noheader", "--format=%R"])
        if done.returncode:
            raise ClusterUnreachable(done.stderr.strip())
        known = sorted(set(done.stdout.split()))
        wanted = self.settings.partition
        if wanted and not set(wanted.split(",")) <= set(known):
            raise ConfigError(
                where=f"launcher.partition: {wanted}",
                found="does not exist on the cluster",
                expected=f"one of {', '.join(known)}",
                fix=nearest(wanted, known),
            )
        return f"partitions {', '.join(known)}"


def job_state(state: str, reason: str, code: int, settings: SlurmSettings) -> JobState:
    """Return the meaning of a Slurm state.

    Raises ConfigError for a job that can never start, or that reached its time limit.
    """
    if state in QUEUED and reason in NEVER:
        raise _unfit(NEVER[reason], f"the job can never start ({reason})", settings)
    if state in QUEUED:
        return JobState(Phase.QUEUED, reason)
    if state in RUNNING:
        return JobState(Phase.RUNNING, state.lower())
    if state == "COMPLETED":
        return JobState(Phase.ENDED)
    if state in ("TIMEOUT", "DEADLINE"):
        raise ConfigError(
            where=f"launcher.time: {settings.time or 'the default of the partition'}",
            found=f"the job reached its time limit ({state})",
            expected="enough time for the step",
            fix="raise it; a training resumes from its last checkpoint",
        )
    if state == "OUT_OF_MEMORY":
        return JobState(
            Phase.ENDED,
            "was killed: out of memory on its node (request more with launcher.sbatch: {mem: …})",
            -9,
        )
    if state in LOST:
        return JobState.lost(f"was ended by the cluster ({state})")
    if state == "FAILED" and code:
        return JobState(Phase.ENDED, "", code)
    return JobState(Phase.ENDED, f"ended in state {state} ({reason})", code or 1)


def _slurm_state(name: str) -> tuple[str, str, int]:
    """Return state, reason and exit code (negative: a signal). Raises ClusterUnreachable."""
    done = _tool(["scontrol", "show", "job", "--oneliner", name])
    if done.returncode == 0 and (state := re.search(r"\bJobState=(\w+)", done.stdout)):
        reason = re.search(r"\bReason=(\S+)", done.stdout)
        code = re.search(r"\bExitCode=(\d+):(\d+)", done.stdout)
        return state[1], reason[1] if reason else "", _code(code[1], code[2]) if code else 0
    if not UNKNOWN_JOB.search(done.stderr):
        raise ClusterUnreachable(done.stderr.strip() or "scontrol printed nothing")
    # Some minutes after its end, a job is only in the accounting, if the cluster has one.
    columns = ["--noheader", "--parsable2", "--allocations", "--format=State,ExitCode"]
    done = _tool(["sacct", *columns, "--jobs", name])
    if done.returncode == 0 and (row := re.match(r"(\w+)[^|]*\|(\d+):(\d+)", done.stdout)):
        return row[1], "", _code(row[2], row[3])
    return "REVOKED", "", 0


def _code(code: str, signal: str) -> int:
    return -int(signal) if int(signal) else int(code)


def _tool(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a tool of Slurm.

    Raises ConfigError if it is not installed, ClusterUnreachable if it hangs.
    """
    name = command[0]
    if shutil.which(name) is None:
        raise ConfigError(
            where="launcher: slurm",
            found=f"{name} is not on this machine",
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
        message = f"{name} did not answer within {ANSWER_SECONDS:.0f} s"
        raise ClusterUnreachable(message) from None


def _refused(message: str, settings: SlurmSettings) -> ConfigError:
    key = next((key for pattern, key in REFUSED if pattern.search(message)), None)
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in message.splitlines()]
    return _unfit(key, f"sbatch refuses the job: {'; '.join(lines)}", settings)


def _unfit(key: str | None, found: str, settings: SlurmSettings) -> ConfigError:
    where = "launcher: slurm"
    if key is not None:
        value = getattr(settings, key)
        where = f"launcher.{key}" + ("" if value is None else f": {value}")
    requested = {
        name: value
        for name in ("partition", "nodes", "time", "gpus")
        if (value := getattr(settings, name)) is not None
    }
    return ConfigError(
        where=where,
        found=found,
        expected=f"a request that fits this cluster; requested: {requested}",
        fix="sinfo and sacctmgr show what the cluster offers",
    )
