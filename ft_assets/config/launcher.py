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
    resources: dict[str, float] = Field(default={}, description="What each worker needs besides, e.g. {CPU: 8}.")
    ship_code: bool = Field(default=True, description="Send this package to the nodes; false: it is installed there.")


AnyLauncher = LocalSettings | AccelerateSettings | RaySettings


def _named(value: Any) -> Any:
    """Read `ray` as {kind: ray}."""
    return {"kind": value} if isinstance(value, str) else value


KINDS: dict[str, type[Retries]] = {
    "local": LocalSettings,
    "accelerate": AccelerateSettings,
    "ray": RaySettings,
}
LauncherSettings = Annotated[AnyLauncher, Field(discriminator="kind"), BeforeValidator(_named)]
