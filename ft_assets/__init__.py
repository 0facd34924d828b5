from importlib import import_module
from typing import Any

COMPONENT = "FineTuneComponent"  # ft_assets.FineTuneComponent, in the YAML of dg


def __getattr__(name: str) -> Any:
    """Return the component. It is imported when somebody asks for it: a step imports no Dagster."""
    if name != COMPONENT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.component"), COMPONENT)


def __dir__() -> list[str]:
    return [*globals(), COMPONENT]
