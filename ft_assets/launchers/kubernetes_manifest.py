"""The manifest of a step's Job: what `launcher:` says, over the user's template. Plain data; no cluster is asked."""

from pathlib import Path
from typing import Any

import yaml

from ft_assets.config.launcher import KubernetesSettings
from ft_assets.errors import ConfigError
from ft_assets.job import Job
from ft_assets.launchers.base import TRAINING_STEPS
from ft_assets.launchers.cluster import unique_name
from ft_assets.launchers.local import GRACE_SECONDS

CONTAINER = "step"
KEPT_SECONDS = 3600  # a Job whose run was killed is removed so long after its end


def manifest(job: Job, job_file: Path, settings: KubernetesSettings, root: Path) -> dict[str, Any]:
    """Return a batch/v1 Job of one pod. Raises ConfigError for a template that cannot be read, or if the store is not mounted."""
    # One pod a step: its ranks share a machine. Training over several machines is what slurm and ray are for.
    gpus = settings.gpus if job.step in TRAINING_STEPS else min(1, settings.gpus)
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    limits |= {"memory": settings.memory} if settings.memory else {}
    requests = {name: value for name in ("cpu", "memory") if (value := getattr(settings, name))}
    volumes, mounts = _volumes(settings, shared_memory=gpus > 1)
    container = {
        "name": CONTAINER,
        "image": settings.image,
        "command": [
            settings.python, "-m", "ft_assets.launchers.node", str(job_file), str(settings.silence_seconds), str(max(1, gpus))
        ],
        "env": [{"name": name, "value": value} for name, value in settings.env.items()],
        "envFrom": [{"secretRef": {"name": name}} for name in settings.env_from_secrets],
        "resources": {"limits": limits, "requests": requests},
        "volumeMounts": mounts,
    }  # fmt: skip
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": int(sum(GRACE_SECONDS))
        + 5,  # the step writes a checkpoint
        "serviceAccountName": settings.service_account,
        "nodeSelector": settings.node_selector,
        "tolerations": settings.tolerations,
        "containers": [container],
        "volumes": volumes,
    }
    name, labels = unique_name(job), {"app.kubernetes.io/managed-by": "ft-assets"}
    made = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": settings.namespace, "labels": labels},
        "spec": {
            "backoffLimit": 0,  # tries are the graph's affair
            "completions": 1,
            "parallelism": 1,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    whole = merged(_template(settings, root), _without_empty(made))
    _require_store(whole, job, settings)
    return whole


def merged(under: Any, over: Any) -> Any:
    """Return `over` on `under`: mappings key by key, lists of named things by name, lists of others joined, all else replaced."""
    if isinstance(under, dict) and isinstance(over, dict):
        both = {key: merged(under[key], over[key]) for key in under.keys() & over.keys()}
        return {**under, **over, **both}
    if not (isinstance(under, list) and isinstance(over, list)) or all(
        isinstance(item, str) for item in over
    ):
        return over  # a command is one thing
    if not all(isinstance(item, dict) and "name" in item for item in (*under, *over)):
        return [*under, *over]
    named = {item["name"]: item for item in over}
    known = {item["name"] for item in under}
    return [merged(item, named.get(item["name"], {})) for item in under] + [
        item for item in over if item["name"] not in known
    ]


def _volumes(
    settings: KubernetesSettings, shared_memory: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    for number, volume in enumerate(settings.volumes):
        name = f"ft-{number}"
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": name, "mountPath": volume.path, "subPath": volume.sub_path})
    if shared_memory:  # a container's own 64 MB are too few for NCCL
        volumes.append({"name": "ft-shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "ft-shm", "mountPath": "/dev/shm"})
    return volumes, mounts


def _template(settings: KubernetesSettings, root: Path) -> dict[str, Any]:
    if settings.template is None:
        return {}
    path, where = root / settings.template, f"launcher.template: {settings.template}"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            where=where,
            found=f"cannot be read: {error}",
            expected="a YAML file with parts of a Job's manifest",
            fix="correct it",
        ) from None
    if not isinstance(found, dict) or found.get("kind", "Job") != "Job":
        kind = found.get("kind") if isinstance(found, dict) else type(found).__name__
        raise ConfigError(
            where=where,
            found=f"holds a {kind}",
            expected="parts of a Job's manifest (spec: {template: {spec: …}})",
            fix="correct it",
        )
    return found


def _without_empty(value: Any) -> Any:
    """Drop what was not set; an `emptyDir: {medium: …}` is not empty."""
    if isinstance(value, dict):
        return {
            key: kept
            for key, item in value.items()
            if (kept := _without_empty(item)) not in (None, {}, [])
        }
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _require_store(whole: dict[str, Any], job: Job, settings: KubernetesSettings) -> None:
    containers = whole["spec"]["template"]["spec"]["containers"]
    mounts = [
        mount["mountPath"]
        for item in containers
        if item["name"] == CONTAINER
        for mount in item.get("volumeMounts", [])
    ]
    for path in (job.work, job.output, job.checkpoints):
        if not any(path.is_relative_to(mount) for mount in mounts):
            raise ConfigError(
                where="launcher.volumes",
                found=f"none is mounted where {path} lies"
                + (f" (there are {', '.join(mounts)})" if mounts else ""),
                expected="a volume with the store, at the path that this machine has it at",
                fix="add {claim: …, path: …}",
            )
