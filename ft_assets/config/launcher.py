"""`launcher:` of finetune.yaml: where heavy steps run. A bare name is a launcher with its defaults.

A launcher is a settings class here, and the class that `implementation` names. The settings class
registers itself: finetune.yaml, `ft plan`, `ft doctor` and `make_launcher` read it from `KINDS`.

Launcher settings are not fingerprinted: where a step ran does not decide what it made.
"""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    Field,
    GetCoreSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from ft_assets.config.section import Section
from ft_assets.errors import ConfigError
from ft_assets.hardware import visible_gpus
from ft_assets.redaction import is_secret_name, redacted

Sharding = Literal["auto", "ddp", "fsdp"]

KINDS: dict[str, type["LauncherSettings"]] = {}  # by kind, in the order of the classes below


class LauncherSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The settings that all launchers share, and what the memory plan needs from a launcher.

    A subclass with a literal `kind` is a launcher. Retries apply to infrastructure faults only,
    never to a step's own failure.
    """

    implementation: ClassVar[
        str
    ]  # module:class, constructed with (settings, folder of the project)
    on_this_machine: ClassVar[bool] = (
        False  # so that the memory plan reads the GPUs of this machine
    )

    kind: str
    retries: int = Field(
        default=2,
        ge=0,
        le=10,
        description="Retries after the first try; only for faults of the infrastructure.",
    )
    retry_seconds: float = Field(
        default=20.0,
        ge=0,
        description="Wait before the first retry; each further wait is twice as long.",
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        kind = get_args(cls.__annotations__.get("kind"))
        if kind:
            KINDS[kind[0]] = cls

    def ranks(self) -> int:
        """Return the number of ranks of a training step. Raises ConfigError."""
        return 1

    def sharding_mode(self) -> Sharding:
        """Return the mode in which the ranks of a training step share the base model."""
        return "ddp"

    def on_gpu(self) -> bool:
        """Return True if a training step runs on GPUs."""
        return bool(visible_gpus())

    def cost_note(self) -> str:
        """Return a line for `ft plan` on what the machine costs; "" if the launcher has no cap."""
        return ""

    def cost_cap(self) -> float | None:
        """Return what the machine may cost at most, or None without a cap."""
        return None

    def price(self) -> float | None:
        """Return what an hour of the machine costs, or None if that is not known."""
        return None


class LocalSettings(LauncherSettings, frozen=True):
    implementation = "ft_assets.launchers.local:LocalLauncher"
    on_this_machine = True

    kind: Literal["local"] = "local"


class AccelerateSettings(LauncherSettings, frozen=True):
    implementation = "ft_assets.launchers.accelerate:AccelerateLauncher"
    on_this_machine = True

    kind: Literal["accelerate"]
    processes: int | None = Field(
        default=None, ge=1, description="Ranks; by default one for each GPU of this machine."
    )
    sharding: Sharding = Field(
        default="auto",
        description="ddp: each rank holds the whole base; fsdp: the base's layers are sharded over "
        "the ranks; auto: fsdp only if, by the memory plan, the base does not fit on one GPU.",
    )

    def ranks(self) -> int:
        """Return the number of ranks of a training step.

        Raises ConfigError for more ranks than GPUs, and for a single rank with `sharding: fsdp`.
        """
        gpus = len(visible_gpus())
        count = self.processes or gpus or 1
        if gpus and count > gpus:
            raise ConfigError(
                where="launcher.processes",
                found=str(count),
                expected=f"at most the {gpus} GPUs of this machine",
                fix="lower it, or remove it",
            )
        if count == 1 and self.sharding == "fsdp":
            raise ConfigError(
                where="launcher.sharding: fsdp",
                found="one process",
                expected="at least 2 processes to shard the base over",
                fix="set processes, or sharding: auto",
            )
        return count

    def sharding_mode(self) -> Sharding:
        return self.sharding


class RaySettings(LauncherSettings, frozen=True):
    implementation = "ft_assets.launchers.ray:RayLauncher"

    kind: Literal["ray"]
    address: str = Field(
        default="auto",
        pattern=r"^(auto|(ray://)?[^:/ ]+:[0-9]+)$",
        description="auto: the cluster that this machine is part of; else host:6379.",
    )
    workers: int = Field(default=1, ge=1, description="Ranks of a training step.")
    use_gpu: bool = Field(default=True, description="One GPU for each worker.")
    resources: dict[str, float] = Field(
        default={}, description="Further resources of each worker, e.g. {CPU: 8}."
    )
    ship_code: bool = Field(
        default=True,
        description="Send this package to the nodes; false: it is installed on them.",
    )

    def ranks(self) -> int:
        return self.workers

    def on_gpu(self) -> bool:
        return self.use_gpu


class ClusterSettings(LauncherSettings, frozen=True):
    """The settings of clusters with a queue."""

    poll_seconds: float = Field(
        default=10.0, gt=0, description="Interval between two requests for the state of a job."
    )
    patience_seconds: float = Field(
        default=600.0,
        gt=0,
        description="A cluster that does not answer for this long counts as a fault.",
    )
    silence_seconds: float = Field(
        default=120.0,
        gt=0,
        description="A job without a heartbeat from its run for this long stops its step, e.g. "
        "when the run was killed.",
    )
    settle_seconds: float = Field(
        default=60.0,
        ge=0,
        description="Longest delay before the shared disk shows a file that a node wrote.",
    )


class SlurmSettings(ClusterSettings, frozen=True):
    implementation = "ft_assets.launchers.slurm:SlurmLauncher"

    kind: Literal["slurm"]
    partition: str | None = Field(default=None, description="By default the cluster's.")
    account: str | None = Field(default=None, description="By default the user's.")
    time: str | None = Field(
        default=None,
        description="Time limit of a job in sbatch's format, e.g. 12:00:00; by default the "
        "partition's.",
    )
    nodes: int = Field(
        default=1, ge=1, description="Nodes of a training step; other steps use one."
    )
    gpus: int = Field(default=1, ge=0, description="GPUs of each node; 0 trains on CPUs with gloo.")
    gres: str | None = Field(
        default=None, description="A typed request instead of gpus, e.g. gpu:a100:4."
    )
    tasks_per_node: int | None = Field(
        default=None,
        ge=1,
        description="Ranks of a training step on each node; by default one for each GPU.",
    )
    sbatch: dict[str, str | int | float | bool] = Field(
        default={},
        description="Further options of sbatch by their long names, e.g. "
        "{mem: 64G, cpus-per-task: 8, exclusive: true}.",
    )
    python: str | None = Field(
        default=None,
        description="The interpreter on the nodes; by default the path of the one that runs here.",
    )

    @property
    def ranks_per_node(self) -> int:
        """The ranks of a training step on each node."""
        return self.tasks_per_node or self.gpus or 1

    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def on_gpu(self) -> bool:
        return bool(self.gpus or self.gres)


class VolumeSettings(Section):
    claim: str = Field(description="The name of a PersistentVolumeClaim of the namespace.")
    path: str = Field(
        pattern="^/", description="The mount path, which must be the same as on this machine."
    )
    sub_path: str | None = Field(
        default=None, description="A folder of the volume instead of the whole volume."
    )


class KubernetesSettings(ClusterSettings, frozen=True):
    implementation = "ft_assets.launchers.kubernetes:KubernetesLauncher"

    kind: Literal["kubernetes"]
    image: str = Field(description="An image with this package and the libraries of this machine.")
    volumes: list[VolumeSettings] = Field(
        default=[], description="The volumes of each pod; one of them holds the store."
    )
    namespace: str = "default"
    context: str | None = Field(
        default=None,
        description="A context of kubeconfig; by default the current one, and in a pod the cluster "
        "of that pod.",
    )
    gpus: int = Field(
        default=1,
        ge=0,
        description="GPUs (nvidia.com/gpu) and ranks of a training step; 0 trains on CPUs.",
    )
    cpu: str | None = Field(default=None, description="The CPU request, e.g. 8 or 500m.")
    memory: str | None = Field(
        default=None, description="The memory request and the memory limit, e.g. 64Gi."
    )
    node_selector: dict[str, str] = Field(default={}, description="Labels that a node must have.")
    tolerations: list[dict[str, str | int]] = Field(
        default=[], description="Tolerated taints, as in a pod's spec."
    )
    service_account: str | None = Field(default=None, description="By default the namespace's.")
    env: dict[str, str] = Field(
        default={},
        description="Environment of the step. No secrets: the manifest shows it to its readers.",
    )
    env_from_secrets: list[str] = Field(
        default=[], description="Secrets of the namespace whose keys become environment variables."
    )
    template: str | None = Field(
        default=None,
        description="A YAML file with parts of a Job's manifest; the keys here override it.",
    )
    python: str = Field(default="python", description="The interpreter in the image.")

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if is_secret_name(name) or redacted(value) != value:
                raise ValueError(
                    f"{name} looks like a secret: store it in a Secret of the cluster and list "
                    "that Secret in env_from_secrets"
                )
        return env

    def ranks(self) -> int:
        return max(1, self.gpus)

    def on_gpu(self) -> bool:
        return self.gpus > 0


class SshSettings(ClusterSettings, frozen=True):
    """One host that ssh reaches. The step survives a connection that is cut for minutes."""

    implementation = "ft_assets.launchers.ssh:SshLauncher"

    kind: Literal["ssh"]
    host: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:-]*$",
        description="A name, an address, or a Host of ~/.ssh/config.",
    )
    user: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="By default ssh's."
    )
    port: int | None = Field(default=None, ge=1, le=65535, description="By default ssh's.")
    identity_file: str | None = Field(
        default=None, description="The private key; by default those of ssh and its agent."
    )
    known_hosts: str | None = Field(
        default=None,
        description="The file with the host's key; by default ssh's. An unknown key is refused.",
    )
    folder: str = Field(
        default=".ft-host",
        pattern=r"^/?[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$",
        description="The folder on the host, absolute or below the home folder.",
    )
    python: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_./-]+$",
        description="The interpreter of an existing environment on the host; by default one is "
        "made there with the versions of the libraries here.",
    )
    gpus: int = Field(
        default=1, ge=0, description="GPUs and ranks of a training step; 0 trains on CPUs."
    )
    secrets: list[str] = Field(
        default=[], description="Environment variables of this machine that the step gets."
    )
    checkpoint_minutes: float = Field(
        default=5.0, gt=0, description="Interval between two copies of the checkpoints to here."
    )
    price_per_hour: float | None = Field(default=None, gt=0, description="The host's price.")
    max_cost: float | None = Field(
        default=None,
        gt=0,
        description="The host's steps end, and it is given back, before it has cost this much. "
        "Counted from the first contact.",
    )
    max_hours: float | None = Field(default=None, gt=0, description="As max_cost, in hours.")
    stop_command: str | None = Field(
        default=None,
        description="A shell command that gives the host back. It runs on the host, also if this "
        "machine is gone.",
    )
    idle_minutes: float = Field(
        default=10.0, gt=0, description="The host is given back after this long without a step."
    )
    poll_seconds: float = Field(
        default=5.0, gt=0, description="Interval between two requests for progress."
    )
    patience_seconds: float = Field(
        default=900.0, gt=0, description="A host that does not answer for this long is a fault."
    )
    silence_seconds: float = Field(
        default=900.0,
        gt=0,
        description="The host's step ends, and the host is given back, after this long without a "
        "sign of life from the run.",
    )
    settle_seconds: float = Field(default=0.0, ge=0, description="Not used: no disk is shared.")

    @model_validator(mode="after")
    def _cap_can_be_kept(self) -> "SshSettings":
        if self.max_cost is not None and self.price_per_hour is None:
            raise ValueError("max_cost needs price_per_hour, the price of the host")
        if self.max_cost is not None and self.stop_command is None:
            raise ValueError(
                "max_cost needs stop_command: without it the host costs money after its step ended"
            )
        return self

    @property
    def hours(self) -> float | None:
        """The hours after which the host is given back; None without a cap."""
        caps = [self.max_hours]
        if self.max_cost is not None and self.price_per_hour is not None:
            caps.append(self.max_cost / self.price_per_hour)
        return min((cap for cap in caps if cap is not None), default=None)

    def ranks(self) -> int:
        return max(1, self.gpus)

    def on_gpu(self) -> bool:
        return self.gpus > 0

    def cost_note(self) -> str:
        price = f", {self.price_per_hour:g} an hour" if self.price_per_hour else ""
        cost = f", at most {self.max_cost:g}" if self.max_cost else ""
        hours = f", at most {self.hours:.1f} hours" if self.hours else ", without a cap"
        back = "" if self.stop_command else ", and not given back: stop_command is not set"
        return f"host {self.host}{price}{cost}{hours}{back}"

    def cost_cap(self) -> float | None:
        return self.max_cost

    def price(self) -> float | None:
        return self.price_per_hour


class _ByKind:
    """Validates `launcher:` by the class that `kind` names: a union of all classes in `KINDS`."""

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        choices = {kind: handler.generate_schema(settings) for kind, settings in KINDS.items()}
        union = core_schema.tagged_union_schema(choices, discriminator="kind")
        return core_schema.no_info_before_validator_function(_with_kind, union)


def _with_kind(value: Any) -> Any:
    """Read `ray` as {kind: ray}."""
    return {"kind": value} if isinstance(value, str) else value


AnyLauncher = Annotated[LauncherSettings, _ByKind()]
