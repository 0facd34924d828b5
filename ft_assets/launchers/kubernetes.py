"""Heavy steps as Jobs of a Kubernetes cluster, by its official client.

Why not dagster-k8s's PipesK8sClient: it blocks until its pod runs, so that nobody sees why one waits; an eviction and a
step's own failure are the same exception; and a pod goes on when the run's process is killed.
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
from ft_assets.errors import ConfigError
from ft_assets.job import Job
from ft_assets.launchers.cluster import ClusterLauncher, NoAnswer, Seen
from ft_assets.launchers.kubernetes_manifest import CONTAINER, manifest
from ft_assets.launchers.kubernetes_states import job_seen, pod_seen

ANSWER_SECONDS = (5.0, 30.0)  # connect, read
CLOSE_SECONDS = 60.0
LOG_LINES = 200


class KubernetesLauncher(ClusterLauncher):
    """Each heavy step is a Job of one pod; a training step has a rank for each GPU of it."""

    def __init__(self, settings: KubernetesSettings, root: Path = Path()) -> None:
        if importlib.util.find_spec("kubernetes") is None:
            raise ConfigError(
                where="launcher: kubernetes",
                found="its client is not installed",
                expected="the extra `kubernetes`",
                fix='pip install "ft_assets[kubernetes]"',
            )
        super().__init__(settings)
        self.settings, self._root = settings, root

    def submit(self, job: Job, job_file: Path) -> str:
        body = manifest(job, job_file, self.settings, self._root)
        name = body["metadata"]["name"]
        self._make_way(name)
        if self._ask(self._batch.create_namespaced_job, self.settings.namespace, body) is None:
            raise ConfigError(
                where=f"launcher.namespace: {self.settings.namespace}",
                found="is not known to the cluster",
                expected="a namespace",
                fix="create or correct it",
            )
        return name

    def look(self, name: str) -> Seen:
        if pods := self._pods(name):
            seen = pod_seen(pods[-1], self.settings)
            about = pods[-1]["metadata"]["name"]
        else:
            found = self._ask(self._batch.read_namespaced_job, name, self.settings.namespace)
            seen, about = job_seen(found, self.settings), name
        if (
            seen.phase == "waiting"
            and (warning := self._warning(about))
            and warning not in seen.said
        ):
            return Seen("waiting", f"{seen.said}: {warning}")
        return seen

    def close(self, name: str, job: Job) -> None:
        with contextlib.suppress(NoAnswer, ConfigError):
            self._keep_words(name, job)
        self._delete(name)

    def greet(self) -> str:
        self._ask(self._core.list_namespaced_pod, self.settings.namespace, limit=1)
        return f"{self._client.configuration.host}, namespace {self.settings.namespace}"

    def _delete(self, name: str) -> None:
        """Delete the Job; return when its pods are gone."""
        deadline = time.monotonic() + CLOSE_SECONDS
        self._ask(
            self._batch.delete_namespaced_job,
            name,
            self.settings.namespace,
            propagation_policy="Background",
        )
        while self._pods(name) and time.monotonic() < deadline:
            time.sleep(min(1.0, self.settings.poll_seconds))

    def _make_way(self, name: str) -> None:
        """Wait for an earlier Job that writes the same checkpoints; it ends itself if its run is gone. Raises NoAnswer if it stays."""
        deadline = time.monotonic() + self.settings.silence_seconds + CLOSE_SECONDS
        while (
            earlier := self._ask(self._batch.read_namespaced_job, name, self.settings.namespace)
        ) is not None:
            if job_seen(earlier, self.settings, strict=False).phase == "ended":
                self._delete(name)
            elif time.monotonic() > deadline:
                raise NoAnswer(f"the Job {name} makes the same artifact and goes on")
            time.sleep(min(1.0, self.settings.poll_seconds))

    def _pods(self, name: str) -> list[dict[str, Any]]:
        """Return the pods of a Job, the newest last."""
        found = (
            self._ask(
                self._core.list_namespaced_pod,
                self.settings.namespace,
                label_selector=f"job-name={name}",
            )
            or {}
        )
        return sorted(
            found.get("items", []), key=lambda pod: pod["metadata"].get("creationTimestamp") or ""
        )

    def _warning(self, name: str) -> str:
        """Return the newest warning about a pod or a Job; nothing if events may not be read."""
        try:
            found = self._ask(
                self._core.list_namespaced_event,
                self.settings.namespace,
                field_selector=f"involvedObject.name={name},type=Warning",
            )
        except ConfigError:
            return ""
        events = sorted(
            (found or {}).get("items", []),
            key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "",
        )
        return f"{events[-1].get('reason')}: {events[-1].get('message')}" if events else ""

    def _keep_words(self, name: str, job: Job) -> None:
        """Add what the pod printed to the job's log: what was said where the step could not begin."""
        for pod in self._pods(name):
            words = self._ask(
                self._core.read_namespaced_pod_log, pod["metadata"]["name"], self.settings.namespace, container=CONTAINER,
                tail_lines=LOG_LINES, as_text=True,
            )  # fmt: skip
            if words:
                with job.log_file.open("a") as log:
                    log.write(words)

    @cached_property
    def _client(self) -> Any:
        from kubernetes import client, config

        settings: Any = client.Configuration()
        settings.retries = 0  # the next poll is the next try
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
                fix="kubectl config get-contexts",
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

    def _ask(
        self, call: Callable[..., Any], *arguments: Any, as_text: bool = False, **options: Any
    ) -> Any:
        """Return the answer as plain data, None for what is not there. Raises ConfigError if it is refused, NoAnswer."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            data = call(
                *arguments, _preload_content=False, _request_timeout=ANSWER_SECONDS, **options
            ).data
        except ApiException as error:
            if error.status == 404:
                return None
            said = _message(error)
            if error.status in (409, 429) or not 400 <= (error.status or 0) < 500:
                raise NoAnswer(said) from None
            if error.status in (401, 403):
                fix = "a role that may create, get and delete jobs, and list pods, their logs and events"
                raise ConfigError(
                    where="launcher: kubernetes", found=said, expected="the right to", fix=fix
                ) from None
            where = (
                f"launcher.template: {self.settings.template}"
                if self.settings.template
                else "launcher: kubernetes"
            )
            raise ConfigError(
                where=where,
                found=said,
                expected="a Job that the cluster takes",
                fix="correct launcher: or the template",
            ) from None
        except (HTTPError, OSError) as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from None
        return data.decode(errors="replace") if as_text else json.loads(data)


def _message(error: Any) -> str:
    try:
        return f"{error.status}: {json.loads(error.body)['message']}"
    except (TypeError, ValueError, KeyError):
        return f"{error.status}: {error.reason}"
