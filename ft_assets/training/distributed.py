"""Training as one of several ranks: what the launcher says of them, and how the effective batch is divided.

The environment is that of `accelerate launch`, torchrun and Ray Train; without it there is one rank. Our launcher adds
FT_SHARDING. The effective batch is what is trained on, wherever that is: micro-batch × accumulation × ranks.
"""

import os

from ft_assets.config import TrainSettings
from ft_assets.errors import ConfigError


def world_size() -> int:
    """Return the number of ranks that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> str:
    """Return how several ranks hold the base: ddp (each the whole), fsdp (divided), or auto (as the memory plan finds)."""
    return os.environ.get("FT_SHARDING", "ddp")


def accumulation(settings: TrainSettings, key: str, ranks: int | None = None) -> int:
    """Return the gradient accumulation steps of each rank (by default of `world_size()` of them). Raises ConfigError unless
    the effective batch divides evenly."""
    ranks = ranks or world_size()
    assert settings.micro_batch is not None, "the memory plan sets it"
    at_once = settings.micro_batch * ranks
    if settings.effective_batch % at_once:
        over = f" x {ranks} ranks" if ranks > 1 else ""
        raise ConfigError(
            where=f"{key}.effective_batch",
            found=str(settings.effective_batch),
            expected=f"a multiple of {key}.micro_batch ({settings.micro_batch}){over}",
            fix="change one of them"
            if ranks == 1
            else f"lower {key}.micro_batch, or take fewer ranks",
        )
    return settings.effective_batch // at_once
