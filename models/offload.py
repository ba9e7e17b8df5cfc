"""Networks that are seldom used: on the host until they are, so that their device memory is free for training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def park(modules: Sequence[nn.Module]) -> None:
    """Moves frozen networks to the host; `awake` fetches them from there."""
    for module in modules:
        module.to("cpu")


@contextmanager
def awake(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """The networks on the device for the time of the block; those that were parked are parked again after it."""
    away = device.type != "cpu"
    parked = [module for module in modules if away and next(module.parameters()).device.type == "cpu"]
    for module in parked:
        module.to(device)
    try:
        yield
    finally:
        park(parked)
