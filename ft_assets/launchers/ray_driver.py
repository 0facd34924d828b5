"""The driver of one step on a Ray cluster, a process of this machine.

    python -m ft_assets.launchers.ray_driver job.json '{"kind": "ray", …}'

Ray Train starts the workers and joins them to a process group (NCCL, or gloo without GPUs). In each
of them the step runs as anywhere else. Its progress comes back through a queue; its files are on
the store's file system, which every node must mount.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from ft_assets.config.launcher import RaySettings
from ft_assets.errors import ArtifactError, ConfigError, FtError, InfrastructureFault, StepFailed
from ft_assets.job import Job, ProgressFile
from ft_assets.launchers.base import save_error
from ft_assets.redaction import guard_stream
from ft_assets.step_runner import execute, watch_lifeline

PASSED_ON = (
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "OMP_NUM_THREADS",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
)
END: tuple[str, None] = ("end", None)
CONNECT_SECONDS = 10.0


def work(config: dict[str, Any]) -> None:
    """Run the step in one worker; Ray Train calls this with `job` (JSON) and `queue`.

    The queue gets ("progress", (message, numbers)) from rank 0.
    """
    job = Job.model_validate_json(config["job"])
    queue = config["queue"]
    if not job.output.is_dir():
        raise ArtifactError(
            where=f"node {socket.gethostname()}: {job.output}",
            found="does not exist",
            expected="the store on a file system that every node mounts at the same path",
            fix="set store: to a folder of such a file system",
        )

    def report(message: str, **numbers: float) -> None:
        queue.put(("progress", (message, numbers)))

    step = importlib.import_module(f"ft_assets.steps.{job.step}").step
    if code := execute(step, job, report, int(os.environ["RANK"])):
        if job.error_file.exists():
            raise FtError.from_dict(json.loads(job.error_file.read_text()))
        raise StepFailed(job.step, code, "")  # the stack trace is in the log


def run(job: Job, settings: RaySettings) -> int:
    """Submit the job, pass on its progress until it ends, and return the exit code."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    _connect(ray, settings)
    queue = Queue(actor_options={"num_cpus": 0})
    report = ProgressFile(job.progress_file)
    listener = threading.Thread(target=_listen, args=(queue, report), daemon=True)
    listener.start()
    try:
        TorchTrainer(
            work,
            train_loop_config={"job": job.model_dump_json(), "queue": queue},
            scaling_config=ScalingConfig(
                num_workers=settings.workers if job.distributed else 1,
                use_gpu=settings.use_gpu,
                resources_per_worker=settings.resources or None,
            ),
            run_config=RunConfig(
                name=job.work.name,
                storage_path=str(job.work / "ray"),
                # The graph handles retries: it can tell which faults are worth one.
                failure_config=FailureConfig(max_failures=0),
            ),
        ).fit()
    except Exception as error:  # Ray's errors have no common base class
        return _exit_code(error, job)
    finally:
        # The queue's actor may have died with its node. That must not hide the outcome of the run.
        with contextlib.suppress(Exception):
            queue.put(END)
        listener.join(10)
        ray.shutdown()
    return 0


def _connect(ray: Any, settings: RaySettings) -> None:
    """Connect to the cluster. Ends the process with the code of a fault if it does not answer."""
    import ft_assets

    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    runtime: dict[str, Any] = {"env_vars": {**passed_on, "TOKENIZERS_PARALLELISM": "false"}}
    if settings.ship_code:
        runtime["py_modules"] = [ft_assets]
    if settings.address != "auto":
        _require_answer(settings.address)
    try:
        ray.init(address=settings.address, runtime_env=runtime, log_to_driver=True)
    except ConnectionError as error:
        if settings.address != "auto":
            _no_answer(settings.address, error)
        raise ConfigError(
            where="launcher.address: auto",
            found="no Ray cluster runs on this machine",
            expected="a machine that is part of a Ray cluster",
            fix="start one (ray start --head), or set launcher.address to that of a cluster",
        ) from None


def _require_answer(address: str) -> None:
    """End as a fault if the port is closed. Ray itself retries for minutes before it fails."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        _no_answer(address, error)


def _no_answer(address: str, error: Exception) -> NoReturn:
    print(f"the Ray cluster at {address} does not answer: {error}", file=sys.stderr)
    sys.exit(InfrastructureFault.exit_code)


def _listen(queue: Any, report: ProgressFile) -> None:
    while True:
        kind, content = queue.get()
        if kind == "end":
            return
        message, numbers = content
        report(message, **numbers)


def _exit_code(error: Exception, job: Job) -> int:
    """Return the exit code for an error of Ray.

    A user's error of the step is saved in the work folder. A lost worker is a fault.
    """
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = [cause for failure in failures for cause in _causes(failure)]
    own = next((cause for cause in causes if isinstance(cause, FtError)), None)
    if own is not None:
        save_error(job, own)
        return own.exit_code
    for failure in failures:
        print(failure, file=sys.stderr)
    lost = (NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError)
    if any(isinstance(cause, lost) for cause in causes):
        return InfrastructureFault.exit_code
    return StepFailed.exit_code


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return the error and the chain of its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = getattr(error, "cause", None) or error.__cause__
    return found


def main() -> None:
    guard_stream(sys.stdout)  # both are the job's log; Ray prints the errors of its workers
    guard_stream(sys.stderr)
    job_file, settings = sys.argv[1:]
    job = Job.model_validate_json(Path(job_file).read_text())
    watch_lifeline()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = run(job, RaySettings.model_validate_json(settings))
    except FtError as error:
        save_error(job, error)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
