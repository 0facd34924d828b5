"""A real Slurm cluster of this machine: munged, slurmctld, and two slurmd of one host."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

import pytest

from ft_assets.launchers.local import free_port
from ft_assets_tests.launching import wait_until

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000
ReturnToService=2
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 OverSubscribe=NO
"""


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[None]:
    """Run a cluster that SLURM_CONF names. Skips the test if Slurm is not installed."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    if missing := [name for name in TOOLS if shutil.which(name) is None]:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}): `make slurm` does it")
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(
            host=gethostname().partition(".")[0],
            folder=folder,
            user=user,
            ports=[free_port() for _ in range(3)],
        )
    )
    munge = [
        "munged",
        "--foreground",
        "--force",
        *(
            f"--{name}={folder}/munge.{name.partition('-')[0]}"
            for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")
        ),
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    with pytest.MonkeyPatch.context() as patch, (folder / "daemons.txt").open("wb") as said:
        patch.setenv("SLURM_CONF", str(conf))
        try:
            for command in (
                munge,
                ["slurmctld", "-D"],
                ["slurmd", "-D", "-N", "n1"],
                ["slurmd", "-D", "-N", "n2"],
            ):
                daemons.append(
                    subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
                )
                if command is munge:
                    wait_until((folder / "munge.socket").exists, 10)
            wait_until(lambda: _states() == ["idle", "idle"], 30)
            yield
        finally:
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
            for daemon in daemons:
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()


def _states() -> list[str]:
    time.sleep(0.2)
    return subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%t"], capture_output=True, text=True
    ).stdout.split()
