"""Training as one of several ranks: the launcher's environment, and the accumulation of each rank.

The environment variables are those of `accelerate launch`, torchrun and Ray Train; without them
there is one rank. Our launcher adds FT_SHARDING. The effective batch does not depend on the number
of ranks: it is micro-batch x accumulation x ranks.
"""

import os

from ft_assets.config import TrainSettings
from ft_assets.errors import ConfigError


def world_size() -> int:
    """Return the number of ranks that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> str:
    """Return how the ranks hold the base: ddp (each in whole), fsdp (sharded), or auto.

    With auto the memory plan decides.
    """
    return os.environ.get("FT_SHARDING", "ddp")


def accumulation(settings: TrainSettings, key: str, ranks: int | None = None) -> int:
    """Return the gradient accumulation steps of each rank; `ranks` defaults to world_size().

    Raises ConfigError unless the effective batch divides evenly.
    """
    ranks = ranks or world_size()
    assert settings.micro_batch is not None, "the memory plan sets it"
    at_once = settings.micro_batch * ranks
    if settings.effective_batch % at_once:
        over = f" x {ranks} ranks" if ranks > 1 else ""
        fix = "change one of them"
        if ranks > 1:
            fix = f"lower {key}.micro_batch, or take fewer ranks"
        raise ConfigError(
            where=f"{key}.effective_batch",
            found=str(settings.effective_batch),
            expected=f"a multiple of {key}.micro_batch ({settings.micro_batch}){over}",
            fix=fix,
        )
    return settings.effective_batch // at_once
