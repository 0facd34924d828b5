"""Heavy steps as Jobs of a Kubernetes cluster, through its official client.

Not dagster-k8s's PipesK8sClient: it blocks until its pod runs, so the reason why a pod waits is not
visible; it raises the same exception for an eviction and for a step's own failure; and its pod goes
on when the run's process is killed.
"""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from ft_assets.config.launcher import KubernetesSettings
from ft_assets.errors import ClusterUnreachable, ConfigError
from ft_assets.job import Job
from ft_assets.launchers.cluster import ClusterLauncher, JobState, Phase
from ft_assets.launchers.kubernetes_manifest import CONTAINER, manifest
from ft_assets.launchers.kubernetes_states import Pod, job_without_pod_state, pod_state

ANSWER_SECONDS = (5.0, 30.0)  # connect, read
CLEAN_UP_SECONDS = 60.0
LOG_LINES = 200
PERMISSIONS = "permission to create, get and delete jobs, and to list pods, their logs and events"


class KubernetesLauncher(ClusterLauncher):
    """Runs each heavy step as a Job of one pod. A training step has one rank for each GPU of it."""

    def __init__(self, settings: KubernetesSettings, root: Path = Path()) -> None:
        if importlib.util.find_spec("kubernetes") is None:
            raise ConfigError(
                where="launcher: kubernetes",
                found="its client is not installed",
                expected="the extra `kubernetes`",
                fix='pip install "ft_assets[kubernetes]"',
            )
        super().__init__(settings)
        self.settings = settings
        self._root = root

    def submit(self, job: Job, job_file: Path) -> str:
        body = manifest(job, job_file, self.settings, self._root)
        name = body["metadata"]["name"]
        self._wait_for_earlier_job(name)
        if self._call(self._batch.create_namespaced_job, self.settings.namespace, body) is None:
            raise ConfigError(
                where=f"launcher.namespace: {self.settings.namespace}",
                found="does not exist on the cluster",
                expected="a namespace of the cluster",
                fix="create the namespace, or correct its name",
            )
        return name

    def poll(self, name: str) -> JobState:
        if pods := self._pods(name):
            state = pod_state(pods[-1], self.settings)
            about = pods[-1].get("metadata", {}).get("name", "")
        else:
            state = job_without_pod_state(self._read_job(name), self.settings)
            about = name
        if state.phase is Phase.QUEUED:
            warning = self._warning(about)
            if warning and warning not in state.detail:
                return JobState(Phase.QUEUED, f"{state.detail}: {warning}")
        return state

    def cancel_and_clean_up(self, name: str, job: Job) -> None:
        with contextlib.suppress(ClusterUnreachable, ConfigError):
            self._keep_log(name, job)
        self._delete(name)

    def ping(self) -> str:
        self._call(self._core.list_namespaced_pod, self.settings.namespace, limit=1)
        return f"{self._client.configuration.host}, namespace {self.settings.namespace}"

    def _delete(self, name: str) -> None:
        """Delete the Job, and wait until its pods are gone."""
        deadline = time.monotonic() + CLEAN_UP_SECONDS
        self._call(
            self._batch.delete_namespaced_job,
            name,
            self.settings.namespace,
            propagation_policy="Background",
        )
        while self._pods(name) and time.monotonic() < deadline:
            self._pause()

    def _wait_for_earlier_job(self, name: str) -> None:
        """Wait for the end of an earlier Job that writes the same checkpoints.

        It ends itself if its run is gone. Raises ClusterUnreachable if it does not end.
        """
        deadline = time.monotonic() + self.settings.silence_seconds + CLEAN_UP_SECONDS
        while (earlier := self._read_job(name)) is not None:
            state = job_without_pod_state(earlier, self.settings, strict=False)
            if state.phase is Phase.ENDED:
                self._delete(name)
            elif time.monotonic() > deadline:
                raise ClusterUnreachable(f"the Job {name} makes the same artifact and does not end")
            self._pause()

    def _pause(self) -> None:
        time.sleep(min(1.0, self.settings.poll_seconds))

    def _read_job(self, name: str) -> Any:
        return self._call(self._batch.read_namespaced_job, name, self.settings.namespace)

    def _pods(self, name: str) -> list[Pod]:
        """Return the pods of a Job, the newest last."""
        answer = self._call(
            self._core.list_namespaced_pod,
            self.settings.namespace,
            label_selector=f"job-name={name}",
        )
        pods: list[Pod] = (answer or {}).get("items", [])
        return sorted(pods, key=lambda pod: pod.get("metadata", {}).get("creationTimestamp") or "")

    def _warning(self, name: str) -> str:
        """Return the newest warning about a pod or a Job; "" without permission to list events."""
        try:
            answer = self._call(
                self._core.list_namespaced_event,
                self.settings.namespace,
                field_selector=f"involvedObject.name={name},type=Warning",
            )
        except ConfigError:
            return ""
        events = sorted(
            (answer or {}).get("items", []),
            key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "",
        )
        return f"{events[-1].get('reason')}: {events[-1].get('message')}" if events else ""

    def _keep_log(self, name: str, job: Job) -> None:
        """Append the pod's output to the job's log. It explains a step that could not start."""
        for pod in self._pods(name):
            text = self._call(
                self._core.read_namespaced_pod_log,
                pod.get("metadata", {}).get("name", ""),
                self.settings.namespace,
                container=CONTAINER,
                tail_lines=LOG_LINES,
                as_text=True,
            )
            if text:
                with job.log_file.open("a") as log:
                    log.write(text)

    @cached_property
    def _client(self) -> Any:
        from kubernetes import client, config

        settings: Any = client.Configuration()
        settings.retries = 0  # the next poll is the retry
        try:
            if self.settings.context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=settings)
            else:
                config.load_kube_config(
                    os.environ.get("KUBECONFIG"),
                    context=self.settings.context,
                    client_configuration=settings,
                )
        except config.ConfigException as error:
            raise ConfigError(
                where=f"launcher.context: {self.settings.context or 'the current one'}",
                found=str(error),
                expected="a context of kubeconfig",
                fix="kubectl config get-contexts lists them",
            ) from None
        return client.ApiClient(settings)

    @cached_property
    def _batch(self) -> Any:
        from kubernetes import client

        return client.BatchV1Api(self._client)

    @cached_property
    def _core(self) -> Any:
        from kubernetes import client

        return client.CoreV1Api(self._client)

    def _call(
        self, call: Callable[..., Any], *arguments: Any, as_text: bool = False, **options: Any
    ) -> Any:
        """Return the answer as plain data, or None if the object does not exist.

        Raises ConfigError if the cluster refuses, ClusterUnreachable.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            data = call(
                *arguments, _preload_content=False, _request_timeout=ANSWER_SECONDS, **options
            ).data
        except ApiException as error:
            if error.status == 404:
                return None
            raise self._meaning(error) from None
        except (HTTPError, OSError) as error:
            raise ClusterUnreachable(f"{type(error).__name__}: {error}") from None
        return data.decode(errors="replace") if as_text else json.loads(data)

    def _meaning(self, error: Any) -> ConfigError | ClusterUnreachable:
        """Return our error for an ApiException."""
        message = _message(error)
        if error.status in (409, 429) or not 400 <= (error.status or 0) < 500:
            return ClusterUnreachable(message)
        if error.status in (401, 403):
            return ConfigError(
                where="launcher: kubernetes",
                found=message,
                expected=PERMISSIONS,
                fix="give the user or the service account a role with these permissions",
            )
        template = self.settings.template
        return ConfigError(
            where=f"launcher.template: {template}" if template else "launcher: kubernetes",
            found=message,
            expected="a Job that the cluster accepts",
            fix="correct launcher: or the template",
        )


def _message(error: Any) -> str:
    try:
        return f"{error.status}: {json.loads(error.body)['message']}"
    except (TypeError, ValueError, KeyError):
        return f"{error.status}: {error.reason}"
