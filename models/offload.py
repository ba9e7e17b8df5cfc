"""What moves between host and device: seldom used networks, offloaded so that their memory is free for training, and tensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, copied from host memory without waiting: from pageable memory a copy would wait until a GPU
    has finished all that it was given before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
