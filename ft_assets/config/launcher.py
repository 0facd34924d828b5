"""`launcher:` of finetune.yaml: where the heavy steps run. A name alone means that launcher with its defaults.

Nothing here is part of a fingerprint: where a step ran does not decide what it made.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ft_assets.config.section import Section


class Retries(Section):
    """What every launcher has: how often a step is tried again when its machine, cluster or network failed; never for an error of its own."""

    retries: int = Field(default=2, ge=0, le=10, description="Tries after the first; only for faults of the infrastructure.")
    retry_seconds: float = Field(default=20.0, ge=0, description="Wait before the first of them; each further wait is twice as long.")


class LocalSettings(Retries):
    kind: Literal["local"] = "local"


class AccelerateSettings(Retries):
    kind: Literal["accelerate"]
    processes: int | None = Field(default=None, ge=1, description="Ranks; by default one a GPU of this machine.")


class RaySettings(Retries):
    kind: Literal["ray"]
    address: str = Field(default="auto", description="auto, host:6379, or http://head:8265 to submit through the head's dashboard.")
    workers: int = Field(default=1, ge=1, description="Ranks of a training step.")
    use_gpu: bool = Field(default=True, description="One GPU a worker.")
    resources: dict[str, float] = Field(default={}, description="What each worker needs besides, e.g. {CPU: 8}.")
    ship_code: bool = Field(default=True, description="Send this package to the nodes; false: it is installed there.")


class KubernetesSettings(Retries):
    kind: Literal["kubernetes"]
    image: str = Field(description="Image with this package and its libraries.")
    namespace: str = "default"
    gpus: int = Field(default=1, ge=0, description="nvidia.com/gpu of the container; a training step uses all of them.")
    gpu_resource: str = "nvidia.com/gpu"
    cpu: str = "4"
    memory: str = "32Gi"
    volume_claim: str = Field(description="The PersistentVolumeClaim that holds the store; every node can mount it.")
    mount_path: str | None = Field(default=None, description="Where the store's volume is mounted here and in the pod; the store's folder.")
    env_secrets: list[str] = Field(default=[], description="Names of Secrets whose keys the step gets as environment variables.")
    service_account: str | None = None
    template: str | None = Field(default=None, description="A YAML file with a Pod to start from: tolerations, node selector, volumes.")
    context: str | None = Field(default=None, description="A context of the kubeconfig; in a cluster, its own account.")
    start_timeout_seconds: float = Field(default=1800, gt=0, description="How long a pod may wait for a node.")


class SlurmSettings(Retries):
    kind: Literal["slurm"]
    partition: str | None = None
    account: str | None = None
    time: str | None = Field(default=None, description="Time limit, e.g. 12:00:00.")
    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=1, ge=0)
    cpus_per_task: int | None = Field(default=None, ge=1)
    memory: str | None = Field(default=None, description="Memory a node, e.g. 64G.")
    options: list[str] = Field(default=[], description="Further options of sbatch, e.g. --qos=low.")
    setup: list[str] = Field(default=[], description="Lines of shell before the step, e.g. module load cuda.")


AnyLauncher = LocalSettings | AccelerateSettings | RaySettings | KubernetesSettings | SlurmSettings


def _named(value: Any) -> Any:
    """Read `ray` as {kind: ray}."""
    return {"kind": value} if isinstance(value, str) else value


KINDS: dict[str, type[Retries]] = {
    "local": LocalSettings,
    "accelerate": AccelerateSettings,
    "ray": RaySettings,
    "kubernetes": KubernetesSettings,
    "slurm": SlurmSettings,
}
LauncherSettings = Annotated[AnyLauncher, Field(discriminator="kind"), BeforeValidator(_named)]
