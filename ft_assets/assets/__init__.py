"""The assets of the graph and their checks: one module an asset, found by `declared`."""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

from ft_assets.config import Project
from ft_assets.orchestration.declarations import Asset, Check


@dataclass(frozen=True)
class Declared:
    """All assets and checks of the package, in the order of their modules."""

    assets: tuple[Asset, ...]
    checks: tuple[Check, ...]

    def of(self, project: Project) -> "Declared":
        """Return the assets that a project has, with their checks."""
        assets = tuple(asset for asset in self.assets if asset.only_if(project))
        checks = tuple(
            check for check in self.checks if check.asset in assets and check.only_if(project)
        )
        return Declared(assets, checks)


def declared() -> Declared:
    """Import every module of this package and collect what it declares."""
    found = list(
        {id(one): one for one in _declarations()}.values()
    )  # imported twice, declared once
    return Declared(
        assets=tuple(one for one in found if isinstance(one, Asset)),
        checks=tuple(one for one in found if isinstance(one, Check)),
    )


def _declarations() -> Iterator[Asset | Check]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Asset | Check):
                yield value
