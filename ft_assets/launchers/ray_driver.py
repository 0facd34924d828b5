"""The driver of one step on a Ray cluster: `python -m ft_assets.launchers.ray_driver job.json '{"kind": "ray", …}'`.

Ray Train starts the workers and joins them to a process group (NCCL, or gloo without GPUs); in it the step runs as it
does anywhere. What it reports and returns comes back through a queue; its files lie on the store's file system, which
every node must see.
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
from ft_assets.errors import ArtifactError, ConfigError, FtError
from ft_assets.job import Job, ProgressFile
from ft_assets.launchers.base import TEMPORARY, TRAINING_STEPS
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
    """Run the step in one worker; the queue gets ("progress", …) of the first rank."""
    job = Job.model_validate_json(config["job"])
    queue = config["queue"]
    if not job.output.is_dir():
        raise ArtifactError(
            where=f"node {socket.gethostname()}: {job.output}",
            found="is not there",
            expected="the store on a file system that every node of the cluster mounts at the same path",
            fix="set store: to a folder of such a file system",
        )
    step = importlib.import_module(f"ft_assets.steps.{job.step}").step
    rank = int(os.environ["RANK"])
    code = execute(
        step, job, lambda message, **numbers: queue.put(("progress", (message, numbers))), rank
    )
    if code:
        raise FtError.from_dict(json.loads(job.error_file.read_text()))


def run(job: Job, settings: RaySettings) -> int:
    """Submit the job, pass its progress on, wait for its end. Returns the exit code."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    import ft_assets

    runtime: dict[str, Any] = {
        "env_vars": {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    }
    runtime["env_vars"]["TOKENIZERS_PARALLELISM"] = "false"
    if settings.ship_code:
        runtime["py_modules"] = [ft_assets]
    _connect(ray, settings, runtime)
    queue = Queue(actor_options={"num_cpus": 0})
    listener = threading.Thread(
        target=_listen, args=(queue, ProgressFile(job.progress_file)), daemon=True
    )
    listener.start()
    try:
        TorchTrainer(
            work,
            train_loop_config={"job": job.model_dump_json(), "queue": queue},
            scaling_config=ScalingConfig(
                num_workers=settings.workers if job.step in TRAINING_STEPS else 1,
                use_gpu=settings.use_gpu,
                resources_per_worker=settings.resources or None,
            ),
            # Tries are the graph's affair: it knows which faults are worth one.
            run_config=RunConfig(
                name=job.work.name,
                storage_path=str(job.work / "ray"),
                failure_config=FailureConfig(max_failures=0),
            ),
        ).fit()
    except (
        Exception
    ) as error:  # Ray's errors have no common root; what they mean is told by _meaning
        return _meaning(error, job)
    finally:
        with contextlib.suppress(
            Exception
        ):  # its actor may have died with its node; that must not hide what the run came to
            queue.put(END)
        listener.join(10)
        ray.shutdown()
    return 0


def _connect(ray: Any, settings: RaySettings, runtime: dict[str, Any]) -> None:
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
            expected="a cluster",
            fix="start one (ray start --head), or name its address",
        ) from None


def _require_answer(address: str) -> None:
    """End as a fault if nobody listens there: Ray itself asks for minutes before it says so."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        _no_answer(address, error)


def _no_answer(address: str, error: Exception) -> NoReturn:
    print(f"the Ray cluster at {address} does not answer: {error}", file=sys.stderr)
    sys.exit(TEMPORARY)


def _listen(queue: Any, report: ProgressFile) -> None:
    while True:
        kind, content = queue.get()
        if kind == "end":
            return
        message, numbers = content
        report(message, **numbers)


def _meaning(error: Exception, job: Job) -> int:
    """Return the exit code for what Ray raised: the step's own error is in the work folder, a lost worker may come back."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    own = next(
        (cause for failure in failures for cause in _causes(failure) if isinstance(cause, FtError)),
        None,
    )
    if own is not None:
        if not job.error_file.exists():
            job.error_file.write_text(json.dumps(own.to_dict()))
        print(own, file=sys.stderr)
        return 2
    lost = (NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError)
    for failure in failures:
        print(failure, file=sys.stderr)
    return (
        TEMPORARY
        if any(isinstance(cause, lost) for failure in failures for cause in _causes(failure))
        else 1
    )


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = getattr(error, "cause", None) or error.__cause__
    return found


def main() -> None:
    job_file, settings = sys.argv[1:]
    job = Job.model_validate_json(Path(job_file).read_text())
    watch_lifeline()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = run(job, RaySettings.model_validate_json(settings))
    except FtError as error:
        job.error_file.write_text(json.dumps(error.to_dict()))
        print(error, file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
