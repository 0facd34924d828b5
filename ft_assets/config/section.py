"""A part of finetune.yaml: frozen, unknown keys refused."""

from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

NUMBERS = {int, float, NoneType}


class Section(BaseModel):
    """A part of finetune.yaml: frozen; unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `r: yes`, which Python would take for 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and set(get_args(kind) or (kind,)) <= NUMBERS:
            raise ValueError(f"{str(value).lower()} is no number")
        return value


def _share(value: Any) -> Any:
    """Read `1%` as 0.01."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


Share = Annotated[float, BeforeValidator(_share)]
OptionalShare = Annotated[float | None, BeforeValidator(_share)]
