"""What the API says of a pod or a Job -> waiting, running or ended, and whose fault. Pure: plain data in, `Seen` out."""

from collections.abc import Mapping
from typing import Any

from ft_assets.config.launcher import KubernetesSettings
from ft_assets.errors import ConfigError
from ft_assets.launchers.base import TEMPORARY
from ft_assets.launchers.cluster import Seen
from ft_assets.launchers.kubernetes_manifest import CONTAINER

# The kubelet has asked for the image more than once when it says so; ErrImagePull alone may be a slow registry.
NO_IMAGE = frozenset({"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
NO_START = frozenset({"StartError", "ContainerCannotRun"})


def pod_seen(pod: Mapping[str, Any], settings: KubernetesSettings) -> Seen:
    """Return what a pod's status means. Raises ConfigError for a pod that can never run."""
    status = pod.get("status", {})
    phase = status.get("phase", "Pending")
    container = next(
        (item for item in status.get("containerStatuses", []) if item["name"] == CONTAINER), {}
    ).get("state", {})
    waiting, terminated = container.get("waiting") or {}, container.get("terminated") or {}
    _require_startable(waiting, terminated, status, settings)
    if phase == "Succeeded":
        return Seen("ended")
    if phase == "Failed":
        return _failed(status, terminated)
    if phase == "Pending":
        unscheduled = next(
            (item for item in _conditions(status, "PodScheduled") if item["status"] == "False"), {}
        )
        return Seen("waiting", _words(unscheduled or waiting) or "Pending")
    return Seen(
        "running",
        f"on {pod.get('spec', {}).get('nodeName', 'a node')}"
        + ("" if phase == "Running" else f" ({phase})"),
    )


def job_seen(
    job: Mapping[str, Any] | None, settings: KubernetesSettings, strict: bool = True
) -> Seen:
    """Return what a Job without a pod means. Raises ConfigError for a deadline that was too short, if strict."""
    if job is None:
        return Seen("ended", "was deleted from the cluster", TEMPORARY)
    status = job.get("status", {})
    if any(item["status"] == "True" for item in _conditions(status, "Complete")):
        return Seen("ended")
    for item in _conditions(status, "Failed"):
        if item["status"] == "True":
            if strict and item.get("reason") == "DeadlineExceeded":
                _too_short(settings)
            return Seen("ended", f"lost its pod ({_words(item)})", TEMPORARY)
    suspended = next(
        (item for item in _conditions(status, "Suspended") if item["status"] == "True"), {}
    )
    return Seen("waiting", _words(suspended) or "no pod yet")


def _require_startable(
    waiting: Mapping[str, Any],
    terminated: Mapping[str, Any],
    status: Mapping[str, Any],
    settings: KubernetesSettings,
) -> None:
    reason = waiting.get("reason")
    if reason in NO_IMAGE:
        raise ConfigError(
            where=f"launcher.image: {settings.image}", found=_words(waiting), expected="an image that the nodes can pull",
            fix="correct it; for a private registry set imagePullSecrets in launcher.template, or a service account that has them",
        )  # fmt: skip
    if reason == "CreateContainerConfigError":
        raise ConfigError(
            where="launcher.env_from_secrets",
            found=_words(waiting),
            expected=f"what the namespace {settings.namespace} has",
            fix="create or correct it",
        )
    if terminated.get("reason") in NO_START:
        raise ConfigError(
            where=f"launcher.image: {settings.image}",
            found=_words(terminated),
            expected=f"{settings.python} in it",
            fix="correct image or python",
        )
    for item in _conditions(status, "PodScheduled"):
        if "persistentvolumeclaim" in item.get("message", "") and "not found" in item["message"]:
            raise ConfigError(
                where="launcher.volumes",
                found=item["message"],
                expected=f"claims of the namespace {settings.namespace}",
                fix="create or correct it",
            )
    if status.get("reason") == "DeadlineExceeded":
        _too_short(settings)


def _failed(status: Mapping[str, Any], terminated: Mapping[str, Any]) -> Seen:
    disrupted = next(
        (item for item in _conditions(status, "DisruptionTarget") if item["status"] == "True"), {}
    )
    if disrupted or status.get("reason"):  # evicted, preempted, its node shut down or lost
        return Seen("ended", f"was ended by the cluster ({_words(disrupted or status)})", TEMPORARY)
    if terminated.get("reason") == "OOMKilled":
        return Seen("ended", "was killed at its memory limit (launcher.memory asks for more)", -9)
    return Seen("ended", "", terminated.get("exitCode", TEMPORARY))


def _too_short(settings: KubernetesSettings) -> None:
    raise ConfigError(
        where=f"launcher.template: {settings.template}",
        found="the Job reached its activeDeadlineSeconds",
        expected="enough time for the step",
        fix="raise it; a training goes on from its last checkpoint",
    )


def _conditions(status: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [item for item in status.get("conditions") or [] if item["type"] == kind]


def _words(said: Mapping[str, Any]) -> str:
    return ": ".join(text for text in (said.get("reason"), said.get("message")) if text)
