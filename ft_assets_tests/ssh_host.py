"""A real sshd of this machine on a high port, with keys of its own, and a tiny step."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ft_assets.config.launcher import SshSettings
from ft_assets.job import Job
from ft_assets.launchers import ssh_trees
from ft_assets.launchers.local import free_port
from ft_assets.launchers.ssh import SshLauncher
from ft_assets_tests.launching import wait_until

SSHD = "/usr/sbin/sshd"
CONF = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv PATH={path}
"""
# It counts to `steps`, with a checkpoint each time, and resumes from the last one.
STEP = '''
"""Step: count."""

import time
from typing import ClassVar

from ft_assets.artifacts.checkpoint_files import damage, list_files
from ft_assets.errors import DataError
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.step_runner import main, takes


class Settings(StepSettings):
    STEP: ClassVar = Step("count", gpu=True)

    steps: int = 3
    seconds: float = 0.05
    megabytes: int = 0


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    import os

    if settings.steps == 0:
        raise DataError(where="steps", found="0", expected="more", fix="raise it")
    folders = sorted(job.checkpoints.glob("checkpoint-*"), key=lambda one: int(one.name[11:]))
    whole = [folder for folder in folders if damage(folder) is None]
    begun = int(whole[-1].name[11:]) if whole else 0
    for number in range(begun + 1, settings.steps + 1):
        time.sleep(settings.seconds)
        made = job.checkpoints / ".writing" / f"checkpoint-{number}"
        made.mkdir(parents=True)
        (made / "state.txt").write_text(str(number))
        list_files(made)
        made.rename(job.checkpoints / made.name)
        report("count", number=number)
    text = (job.inputs["data"] / "rows.txt").read_text()
    (job.output / "info").mkdir()
    (job.output / "info" / "begun.txt").write_text(str(begun))
    (job.output / "info" / "read.txt").write_text(str(job.inputs["data"]))
    (job.output / "rows.txt").write_text(text.upper())
    (job.output / "large.bin").write_bytes(b"x" * settings.megabytes * 1_000_000)
    print("token", len(os.environ.get("TEST_TOKEN", "")))
    return StepResult({"begun": begun, "counted": settings.steps})


if __name__ == "__main__":
    main(step)
'''


class Host:
    """A running sshd, and the launchers that reach it."""

    def __init__(self, folder: Path, path: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.returned = folder / "given-back.txt"
        for name in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True)
        self.known(folder / "host_key.pub")
        (folder / "sshd.conf").write_text(CONF.format(port=self.port, folder=folder, path=path))
        self.come_back()

    def known(self, public: Path) -> None:
        """Note a key as the one of this host."""
        kind, key, *_ = public.read_text().split()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def come_back(self) -> None:
        command = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd.conf")]
        log = (self.folder / "sshd.txt").open("ab")
        self.process = subprocess.Popen(command, stderr=log, start_new_session=True)
        wait_until(lambda: b"listening" in (self.folder / "sshd.txt").read_bytes(), 10)

    def cut(self) -> None:
        """End the server and all its connections, but no step."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.process.kill()
        self.process.wait()
        for child in children.split():
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        (self.folder / "sshd.txt").unlink()

    def settings(self, **options: Any) -> SshSettings:
        given = {
            "kind": "ssh",
            "host": "127.0.0.1",
            "port": self.port,
            "identity_file": str(self.folder / "user_key"),
            "known_hosts": str(self.folder / "known_hosts"),
            "folder": str(self.folder / "there"),
            "python": sys.executable,
            "gpus": 0,
            "poll_seconds": 0.2,
            "silence_seconds": 60,
            "stop_command": f"echo back >> {self.returned}",
        }
        return SshSettings(**{**given, **options})

    def launcher(self, **options: Any) -> SshLauncher:
        return SshLauncher(self.settings(**options))

    def processes(self) -> dict[str, int]:
        """Return {command line: pid} of the steps and the keeper of this host that run."""
        found = {}
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                text = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if f"{self.folder}/" in text and text.split()[0] in (sys.executable, "/bin/sh"):
                    found[text] = int(file.parent.name)
        return found

    def kill_keeper(self) -> None:
        for text, pid in self.processes().items():
            if "agent.py keep" in text:
                os.kill(pid, signal.SIGKILL)


@contextmanager
def ssh_host(folder: Path, path: str = "") -> Iterator[Host]:
    """Run an sshd. Skips the test without Debian's openssh-server and rsync."""
    if not Path(SSHD).exists() or shutil.which("rsync") is None:
        pytest.skip("openssh-server or rsync is not installed: `make sshd` does it")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, which a service makes
    folder.mkdir(parents=True, exist_ok=True)
    host = Host(folder, path or os.environ["PATH"])
    try:
        yield host
    finally:
        host.kill_keeper()
        host.cut()


def with_count_step(folder: Path) -> None:
    """Add the step `count` to the code that is sent to a host."""
    real, step = ssh_trees.code_files, folder / "count.py"
    step.write_text(STEP)
    ssh_trees.code_files = lambda: {**real(), "ft_assets/steps/count.py": step}


def count_job(folder: Path, **settings: Any) -> Job:
    """Return a job of the step `count` in `folder`. It reads one file."""
    data = folder / "data"
    if not data.exists():
        from ft_assets.artifacts.manifest import Manifest, file_entries

        data.mkdir(parents=True)
        (data / "rows.txt").write_text("rows\n" * 200_000)
        given = {"asset": "data", "partition": None, "fingerprint": "1", "data_version": "1"}
        given |= {"parts": {}, "code_version": "1", "settings": None, "inputs": {}}
        given |= {"environment": {}, "metrics": {}, "started": 0, "finished": 0}
        files = file_entries(data)
        (data / "manifest.json").write_text(
            Manifest.model_validate({**given, "files": files}).to_text()
        )
    number = len(list(folder.glob("work-*")))
    output = folder / f"output-{number}"
    output.mkdir()
    return Job(
        step="count",
        asset="counted",
        partition=None,
        fingerprint="1",
        gpu=True,
        settings=settings,
        inputs={"data": data},
        output=output,
        checkpoints=folder / "checkpoints",
        work=folder / f"work-{number}",
    )
