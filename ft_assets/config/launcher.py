"""`launcher:` of finetune.yaml: where the heavy steps run. A name alone means that launcher with its defaults.

Nothing here is part of a fingerprint: where a step ran does not decide what it made.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from ft_assets.config.section import Section

SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)


class Retries(Section):
    """What every launcher has: how often a step is tried again when its machine, cluster or network failed; never for an error of its own."""

    retries: int = Field(
        default=2,
        ge=0,
        le=10,
        description="Tries after the first; only for faults of the infrastructure.",
    )
    retry_seconds: float = Field(
        default=20.0,
        ge=0,
        description="Wait before the first of them; each further wait is twice as long.",
    )


class LocalSettings(Retries):
    kind: Literal["local"] = "local"


class AccelerateSettings(Retries):
    kind: Literal["accelerate"]
    processes: int | None = Field(
        default=None, ge=1, description="Ranks; by default one a GPU of this machine."
    )
    sharding: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="ddp: each rank holds the whole base; fsdp: the ranks divide the base's layers among them; "
        "auto: fsdp only where the memory plan finds that one GPU does not hold it.",
    )


class RaySettings(Retries):
    kind: Literal["ray"]
    address: str = Field(
        default="auto",
        pattern=r"^(auto|(ray://)?[^:/ ]+:[0-9]+)$",
        description="auto: the cluster that this machine is part of; else host:6379.",
    )
    workers: int = Field(default=1, ge=1, description="Ranks of a training step.")
    use_gpu: bool = Field(default=True, description="One GPU a worker.")
    resources: dict[str, float] = Field(
        default={}, description="What each worker needs besides, e.g. {CPU: 8}."
    )
    ship_code: bool = Field(
        default=True, description="Send this package to the nodes; false: it is installed there."
    )


class ClusterSettings(Retries):
    """What clusters with a queue have in common."""

    poll_seconds: float = Field(
        default=10.0, gt=0, description="How often the cluster is asked for the state of a job."
    )
    patience_seconds: float = Field(
        default=600.0, gt=0, description="A cluster that does not answer for so long is a fault."
    )
    silence_seconds: float = Field(
        default=120.0,
        gt=0,
        description="A job that hears nothing of its run for so long ends its step, e.g. when the run was killed.",
    )
    settle_seconds: float = Field(
        default=60.0,
        ge=0,
        description="How late the shared disk may show a file that a node wrote.",
    )


class SlurmSettings(ClusterSettings):
    kind: Literal["slurm"]
    partition: str | None = Field(default=None, description="By default the cluster's.")
    account: str | None = Field(default=None, description="By default the user's.")
    time: str | None = Field(
        default=None,
        description="The limit of a job as sbatch takes it, e.g. 12:00:00; by default the partition's.",
    )
    nodes: int = Field(
        default=1, ge=1, description="Nodes of a training step; other steps take one."
    )
    gpus: int = Field(default=1, ge=0, description="GPUs of each node; 0 trains on CPUs with gloo.")
    gres: str | None = Field(
        default=None, description="A typed request in the place of gpus, e.g. gpu:a100:4."
    )
    tasks_per_node: int | None = Field(
        default=None,
        ge=1,
        description="Ranks of a training step on each node; by default one a GPU.",
    )
    sbatch: dict[str, str | int | float | bool] = Field(
        default={},
        description="More options of sbatch by their long names, e.g. {mem: 64G, cpus-per-task: 8, exclusive: true}.",
    )
    python: str | None = Field(
        default=None,
        description="The interpreter on the nodes; by default the path of the one that runs here.",
    )

    @property
    def ranks_per_node(self) -> int:
        """Return the ranks of a training step on each node."""
        return self.tasks_per_node or self.gpus or 1


class VolumeSettings(Section):
    claim: str = Field(description="The name of a PersistentVolumeClaim of the namespace.")
    path: str = Field(
        pattern="^/", description="Where it is mounted: where this machine has it too."
    )
    sub_path: str | None = Field(
        default=None, description="A folder of the volume instead of the whole."
    )


class KubernetesSettings(ClusterSettings):
    kind: Literal["kubernetes"]
    image: str = Field(description="An image with this package and the libraries of this machine.")
    volumes: list[VolumeSettings] = Field(
        default=[], description="What each pod mounts; one of them holds the store."
    )
    namespace: str = "default"
    context: str | None = Field(
        default=None,
        description="A context of kubeconfig; by default the current one, in a pod that pod's cluster.",
    )
    gpus: int = Field(
        default=1,
        ge=0,
        description="GPUs (nvidia.com/gpu) and ranks of a training step; 0 trains on CPUs.",
    )
    cpu: str | None = Field(default=None, description="CPUs that are asked for, e.g. 8 or 500m.")
    memory: str | None = Field(
        default=None, description="Memory that is asked for, and the limit, e.g. 64Gi."
    )
    node_selector: dict[str, str] = Field(default={}, description="Labels that a node must have.")
    tolerations: list[dict[str, str | int]] = Field(
        default=[], description="Taints that are tolerated, as in a pod's spec."
    )
    service_account: str | None = Field(default=None, description="By default the namespace's.")
    env: dict[str, str] = Field(
        default={},
        description="Environment of the step. No secrets: they would stand in the manifest.",
    )
    env_from_secrets: list[str] = Field(
        default=[], description="Secrets of the namespace whose keys become environment variables."
    )
    template: str | None = Field(
        default=None,
        description="A YAML file with parts of a Job's manifest; what is set here goes over it.",
    )
    python: str = Field(default="python", description="The interpreter in the image.")

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if SECRET.search(name):
                raise ValueError(
                    f"{name} looks like a secret: put it into a Secret of the cluster and name that in env_from_secrets"
                )
        return env


AnyLauncher = LocalSettings | AccelerateSettings | RaySettings | SlurmSettings | KubernetesSettings


def _named(value: Any) -> Any:
    """Read `ray` as {kind: ray}."""
    return {"kind": value} if isinstance(value, str) else value


KINDS: dict[str, type[Retries]] = {
    "local": LocalSettings,
    "accelerate": AccelerateSettings,
    "ray": RaySettings,
    "slurm": SlurmSettings,
    "kubernetes": KubernetesSettings,
}
LauncherSettings = Annotated[AnyLauncher, Field(discriminator="kind"), BeforeValidator(_named)]
