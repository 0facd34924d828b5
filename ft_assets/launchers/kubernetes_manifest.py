"""The manifest of a step's Job: the keys of `launcher:` over the user's template.

Manifests are plain dicts, because their schema is Kubernetes's. No cluster is contacted.
"""

from pathlib import Path
from typing import Any

import yaml

from ft_assets.config.launcher import KubernetesSettings
from ft_assets.errors import ConfigError
from ft_assets.job import Job
from ft_assets.launchers.cluster import unique_name
from ft_assets.launchers.local import GRACE_SECONDS
from ft_assets.redaction import is_secret_name, redacted

CONTAINER = "step"
KEPT_SECONDS = 3600  # the cluster removes a Job whose run was killed this long after its end
LABELS = {"app.kubernetes.io/managed-by": "ft-assets"}


def manifest(job: Job, job_file: Path, settings: KubernetesSettings, root: Path) -> dict[str, Any]:
    """Return a batch/v1 Job of one pod.

    Raises ConfigError for a template that cannot be read or holds a secret, or if no volume holds
    the store.
    """
    # One pod for each step: its ranks share a machine. Use slurm or ray to train on several
    # machines.
    gpus = settings.gpus if job.distributed else min(1, settings.gpus)
    made = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": unique_name(job),
            "namespace": settings.namespace,
            "labels": LABELS,
        },
        "spec": {
            "backoffLimit": 0,  # the graph handles retries
            "completions": 1,
            "parallelism": 1,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": {"metadata": {"labels": LABELS}, "spec": _pod(job_file, settings, gpus)},
        },
    }
    whole = merged(_template(settings, root), _without_empty(made))
    _refuse_secrets(whole)
    _require_store(whole, job, settings)
    return whole


def _pod(job_file: Path, settings: KubernetesSettings, gpus: int) -> dict[str, Any]:
    """Return the spec of the pod."""
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    limits |= {"memory": settings.memory} if settings.memory else {}
    requests = {name: value for name in ("cpu", "memory") if (value := getattr(settings, name))}
    volumes = [
        {"name": f"ft-{number}", "persistentVolumeClaim": {"claimName": volume.claim}}
        for number, volume in enumerate(settings.volumes)
    ]
    mounts = [
        {"name": f"ft-{number}", "mountPath": volume.path, "subPath": volume.sub_path}
        for number, volume in enumerate(settings.volumes)
    ]
    if gpus > 1:  # a container has 64 MB of shared memory, which is too little for NCCL
        volumes.append({"name": "ft-shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "ft-shm", "mountPath": "/dev/shm"})
    node = [settings.python, "-m", "ft_assets.launchers.node"]
    container = {
        "name": CONTAINER,
        "image": settings.image,
        "command": [*node, str(job_file), str(settings.silence_seconds), str(max(1, gpus))],
        "env": [{"name": name, "value": value} for name, value in settings.env.items()],
        "envFrom": [{"secretRef": {"name": name}} for name in settings.env_from_secrets],
        "resources": {"limits": limits, "requests": requests},
        "volumeMounts": mounts,
    }
    return {
        "restartPolicy": "Never",
        # Time for the step to write a checkpoint.
        "terminationGracePeriodSeconds": int(sum(GRACE_SECONDS)) + 5,
        "serviceAccountName": settings.service_account,
        "nodeSelector": settings.node_selector,
        "tolerations": settings.tolerations,
        "containers": [container],
        "volumes": volumes,
    }


def merged(under: Any, over: Any) -> Any:
    """Return `over` merged onto `under`.

    Mappings are merged key by key, lists of named items by name. Other lists of mappings are
    joined. Everything else is replaced, also a list of strings such as a command.
    """
    if isinstance(under, dict) and isinstance(over, dict):
        both = {key: merged(under[key], over[key]) for key in under.keys() & over.keys()}
        return {**under, **over, **both}
    if not (isinstance(under, list) and isinstance(over, list)):
        return over
    if all(isinstance(item, str) for item in over):
        return over
    if not all(isinstance(item, dict) and "name" in item for item in (*under, *over)):
        return [*under, *over]
    named = {item["name"]: item for item in over}
    known = {item["name"] for item in under}
    return [merged(item, named.get(item["name"], {})) for item in under] + [
        item for item in over if item["name"] not in known
    ]


def _template(settings: KubernetesSettings, root: Path) -> dict[str, Any]:
    if settings.template is None:
        return {}
    where = f"launcher.template: {settings.template}"
    try:
        found = yaml.safe_load((root / settings.template).read_text(encoding="utf-8"))
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
            found=f"contains a {kind}",
            expected="parts of a Job's manifest (spec: {template: {spec: …}})",
            fix="correct it",
        )
    return found


def _without_empty(value: Any) -> Any:
    """Return the value without unset items. `emptyDir: {medium: …}` is set."""
    if isinstance(value, dict):
        return {
            key: kept
            for key, item in value.items()
            if (kept := _without_empty(item)) not in (None, {}, [])
        }
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _refuse_secrets(whole: dict[str, Any]) -> None:
    """Raise ConfigError for a secret that stands in the manifest by its value."""
    spec = whole["spec"]["template"]["spec"]
    for container in (*spec["containers"], *spec.get("initContainers", [])):
        for entry in container.get("env", []):
            name, value = entry["name"], str(entry.get("value", ""))
            if value and (is_secret_name(name) or redacted(value) != value):
                raise ConfigError(
                    where=f"launcher.template: env {name}",
                    found="holds what looks like a secret, and every reader of the Job sees it",
                    expected="a reference to a Secret of the cluster",
                    fix="list that Secret in launcher.env_from_secrets, or write valueFrom",
                )


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
            listed = f" (mounted: {', '.join(mounts)})" if mounts else ""
            raise ConfigError(
                where="launcher.volumes",
                found=f"none is mounted at {path}{listed}",
                expected="a volume with the store, at the same path as on this machine",
                fix="add {claim: …, path: …}",
            )
