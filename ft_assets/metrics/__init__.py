"""The task metrics: one function with one descriptor each.

Every module of this package is imported here, so that a new file is a new metric. Modules import
libraries inside their functions: reading finetune.yaml imports this package.
"""

import importlib
import pkgutil

from ft_assets.metrics.registry import Metric, Option, higher_is_better, registered

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Metric", "Option", "higher_is_better", "registered"]
