"""A run as a process of its own that outlives the code server and the daemon.

Dagster's default launcher makes it a child of the code server and does not report its health: after
the server is killed or the machine restarts, such a run stays "started" forever and keeps its place
in the pool. This launcher reports the health to run monitoring, which marks a dead run failed and
frees its place. Dagster's run retries then start it again.
"""

import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from ft_assets.compat.dagster import (
    CheckRunHealthResult,
    ConfigurableClass,
    ConfigurableClassData,
    InstanceRef,
    LaunchRunContext,
    RunLauncher,
    WorkerStatus,
    keep_history_clean,
    write_run,
)
from ft_assets.runs.process import RunProcess


class ProcessRunLauncher(RunLauncher, ConfigurableClass):
    """Starts `ft_assets.runs.worker` on the daemon's machine, with the code location's Python."""

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        # The daemon and the webserver write to the history too, and load no definitions.
        keep_history_clean()
        super().__init__()

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        return self._inst_data

    @classmethod
    def config_type(cls) -> Mapping[str, Any]:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]
    ) -> "ProcessRunLauncher":
        return cls(inst_data)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Start the run's process. Raises ValueError for a run without a code location, OSError."""
        run, instance = context.dagster_run, self._instance
        argument, python = write_run(context, instance)
        # In the daemon's session: what stops the daemon at a terminal or in systemd interrupts its
        # runs too, and they write a checkpoint.
        process = subprocess.Popen(
            [python or sys.executable, "-m", "ft_assets.runs.worker", argument],
            stdin=subprocess.DEVNULL,
        )
        instance.report_engine_event(
            f"Started process {process.pid} for the run.", run, cls=type(self)
        )
        threading.Thread(
            target=_bury,
            args=(process, instance.get_ref(), run.run_id),
            daemon=True,
            name=f"run-{run.run_id[:8]}",
        ).start()

    def terminate(self, run_id: str) -> bool:
        """Stop the run's process after a checkpoint. Return False if it runs elsewhere."""
        instance = self._instance
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        instance.report_run_canceling(run)
        process = RunProcess.of(run_id, run.tags)
        if process is None:
            # It has not begun, and will read that it must not. If it never does, run monitoring
            # ends the run.
            return run.status == DagsterRunStatus.STARTING
        if not process.here:
            instance.report_engine_event(
                f"The run is {process}: it can be stopped only there.", run, cls=type(self)
            )
            return False
        if not process.terminate():
            end_run(instance, run_id, f"{process} had ended already")
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Return FAILED only if the run's process has certainly ended.

        Run monitoring marks everything failed that is not RUNNING, also UNKNOWN. But a run that is
        not visible from here (another machine's, or one of `ft run`) must not be started twice.
        """
        process = RunProcess.of(run.run_id, run.tags)
        if process is None:
            return CheckRunHealthResult(
                WorkerStatus.RUNNING, "its process was not started by this launcher"
            )
        if not process.here:
            return CheckRunHealthResult(
                WorkerStatus.RUNNING, f"{process}: not visible from this machine"
            )
        if process.alive:
            return CheckRunHealthResult(WorkerStatus.RUNNING, run_worker_id=str(process))
        return CheckRunHealthResult(
            WorkerStatus.FAILED, f"{process} exited unexpectedly", run_worker_id=str(process)
        )


def _bury(process: subprocess.Popen[bytes], ref: InstanceRef, run_id: str) -> None:
    """Wait for a run's process, and report one that ended before its run did.

    Run monitoring would notice it an interval later, and a run that could not start only after its
    whole start timeout.
    """
    code = process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    with DagsterInstance.from_ref(ref) as instance:
        end_run(instance, run_id, f"process {process.pid} of the run {how}")


def end_run(instance: DagsterInstance, run_id: str, why: str) -> None:
    """End a run whose process has ended, if the run has not ended.

    Run monitoring frees its place in the pool later: the step of a killed process has 30 seconds
    for a checkpoint, and holds the GPU until then.
    """
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return
    if run.status == DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, why)
    else:
        instance.report_run_failed(run, why)
