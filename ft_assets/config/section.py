"""A part of finetune.yaml: frozen, unknown keys refused."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A part of finetune.yaml: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _share(value: Any) -> Any:
    """Read `1%` as 0.01."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


Share = Annotated[float, BeforeValidator(_share)]
