"""Score with the model in training mode, but without dropout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Disable dropout inside the block while the model stays in training mode.

    Attention has its rate as a number (`attention_dropout`), which it passes to the kernel. On a
    CPU a forward pass in evaluation mode would spoil NF4 weights for training for good.
    """
    active = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Dropout) and module.training
    ]
    training = model.training
    model.train()
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    rates = [
        (module, name, rate)
        for module in model.modules()
        if not isinstance(module, torch.nn.Dropout)
        for name, rate in vars(module).items()
        if "drop" in name and isinstance(rate, float) and rate
    ]
    for module in dropouts:
        module.eval()
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        model.train(training)
        for module in dropouts:
            module.train(module in active)
        for module, name, rate in rates:
            setattr(module, name, rate)


def turn_off_dropout(model: Any) -> None:
    """Set every rate of dropout to 0 for good, also those that attention has as a number."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, rate in list(vars(module).items()):
            if "drop" in name and isinstance(rate, float):
                setattr(module, name, 0.0)
