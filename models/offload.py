"""Offloading of seldom used networks to the CPU, so that their device memory is free for training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def offload_to_cpu(modules: Sequence[nn.Module]) -> None:
    """Moves frozen networks to the CPU; `on_device` brings them back while they are needed."""
    for module in modules:
        module.to("cpu")


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Holds the networks on the device inside the block; offloaded ones return to the CPU afterwards."""
    offloaded = [m for m in modules if device.type != "cpu" and next(m.parameters()).device.type == "cpu"]
    for module in offloaded:
        module.to(device)
    try:
        yield
    finally:
        offload_to_cpu(offloaded)
