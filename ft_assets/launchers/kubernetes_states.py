"""The status of a pod or a Job in the Kubernetes API -> a `JobState`. Pure functions."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from ft_assets.config.launcher import KubernetesSettings
from ft_assets.errors import ConfigError, InfrastructureFault
from ft_assets.launchers.cluster import JobState, Phase
from ft_assets.launchers.kubernetes_manifest import CONTAINER

# The kubelet has tried more than once when it reports these. A single ErrImagePull may be a slow
# registry.
NO_IMAGE = frozenset({"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
NO_START = frozenset({"StartError", "ContainerCannotRun"})


class Reason(TypedDict, total=False):
    """The reason and the message that the API gives for many states."""

    reason: str
    message: str


class Condition(Reason):
    type: str
    status: str


class Terminated(Reason, total=False):
    exitCode: int


class ContainerState(TypedDict, total=False):
    waiting: Reason
    terminated: Terminated


class ContainerStatus(TypedDict):
    name: str
    state: NotRequired[ContainerState]


class Status(Reason, total=False):
    """The fields that we read in the status of a pod (v1) and of a Job (batch/v1)."""

    phase: str
    conditions: list[Condition] | None
    containerStatuses: list[ContainerStatus]


class Metadata(TypedDict, total=False):
    name: str
    creationTimestamp: str | None


class PodSpec(TypedDict, total=False):
    nodeName: str


class Pod(TypedDict, total=False):
    metadata: Metadata
    spec: PodSpec
    status: Status


class KubernetesJob(TypedDict, total=False):
    status: Status


def pod_state(pod: Pod, settings: KubernetesSettings) -> JobState:
    """Return the state of a pod. Raises ConfigError for a pod that can never run."""
    status = pod.get("status", {})
    phase = status.get("phase", "Pending")
    containers = status.get("containerStatuses", [])
    container = next((item.get("state") for item in containers if item["name"] == CONTAINER), None)
    waiting = (container or {}).get("waiting") or {}
    terminated = (container or {}).get("terminated") or {}
    _require_startable(waiting, terminated, status, settings)
    if phase == "Succeeded":
        return JobState(Phase.ENDED)
    if phase == "Failed":
        return _failed(status, terminated)
    if phase == "Pending":
        unscheduled = _condition(status, "PodScheduled", "False")
        return JobState(Phase.QUEUED, _text(unscheduled or waiting) or "Pending")
    node = pod.get("spec", {}).get("nodeName", "a node")
    return JobState(Phase.RUNNING, f"on {node}" + ("" if phase == "Running" else f" ({phase})"))


def job_without_pod_state(
    job: KubernetesJob | None, settings: KubernetesSettings, strict: bool = True
) -> JobState:
    """Return the state of a Job that has no pod.

    Raises ConfigError if its deadline was too short, unless `strict` is false.
    """
    if job is None:
        return JobState.lost("was deleted from the cluster")
    status = job.get("status", {})
    if _condition(status, "Complete"):
        return JobState(Phase.ENDED)
    if failed := _condition(status, "Failed"):
        if strict and failed.get("reason") == "DeadlineExceeded":
            raise _deadline_exceeded(settings)
        return JobState.lost(f"lost its pod ({_text(failed)})")
    suspended = _condition(status, "Suspended")
    return JobState(Phase.QUEUED, _text(suspended or {}) or "no pod yet")


def _require_startable(
    waiting: Reason, terminated: Terminated, status: Status, settings: KubernetesSettings
) -> None:
    reason = waiting.get("reason")
    if reason in NO_IMAGE:
        raise ConfigError(
            where=f"launcher.image: {settings.image}",
            found=_text(waiting),
            expected="an image that the nodes can pull",
            fix="correct it; for a private registry set imagePullSecrets in launcher.template, or "
            "a service account that has them",
        )
    if reason == "CreateContainerConfigError":
        raise ConfigError(
            where="launcher.env_from_secrets",
            found=_text(waiting),
            expected=f"Secrets of the namespace {settings.namespace}",
            fix="create the Secret, or correct its name",
        )
    if terminated.get("reason") in NO_START:
        raise ConfigError(
            where=f"launcher.image: {settings.image}",
            found=_text(terminated),
            expected=f"an image that contains {settings.python}",
            fix="correct image or python",
        )
    for item in _conditions(status, "PodScheduled"):
        message = item.get("message", "")
        if "persistentvolumeclaim" in message and "not found" in message:
            raise ConfigError(
                where="launcher.volumes",
                found=message,
                expected=f"claims of the namespace {settings.namespace}",
                fix="create the claim, or correct its name",
            )
    if status.get("reason") == "DeadlineExceeded":
        raise _deadline_exceeded(settings)


def _failed(status: Status, terminated: Terminated) -> JobState:
    disrupted = _condition(status, "DisruptionTarget")
    if disrupted or status.get("reason"):  # evicted, preempted, its node shut down or lost
        return JobState.lost(f"was ended by the cluster ({_text(disrupted or status)})")
    if terminated.get("reason") == "OOMKilled":
        detail = "was killed: out of memory at its limit (request more with launcher.memory)"
        return JobState(Phase.ENDED, detail, -9)
    code = terminated.get("exitCode", InfrastructureFault.exit_code)
    return JobState(Phase.ENDED, "", code)


def _deadline_exceeded(settings: KubernetesSettings) -> ConfigError:
    return ConfigError(
        where=f"launcher.template: {settings.template}",
        found="the Job reached its activeDeadlineSeconds",
        expected="enough time for the step",
        fix="raise it; a training resumes from its last checkpoint",
    )


def _conditions(status: Status, kind: str) -> Sequence[Condition]:
    return [item for item in status.get("conditions") or [] if item["type"] == kind]


def _condition(status: Status, kind: str, value: str = "True") -> Condition | None:
    """Return the first condition of this kind that has this value, or None."""
    return next((item for item in _conditions(status, kind) if item["status"] == value), None)


def _text(reason: Reason) -> str:
    parts = (reason.get("reason"), reason.get("message"))
    return ": ".join(part for part in parts if part)
