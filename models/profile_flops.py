"""Counted, not guessed: the floating-point operations of a network."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.families import network_family
from models.gan import Discriminator, Head, feature_shape


def counted(call: Callable[[], object]) -> float:
    """FLOP of matrix products, convolutions and attentions that a call executes, backward passes and recomputation
    included. Not counted: flash attention on a CPU, xformers."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _count(module: nn.Module, *args: object, **kwargs: object) -> float:
    with torch.no_grad():
        return counted(lambda: module(*args, **kwargs))


def forward_flops(config: dict, latent_shape: tuple[int, int, int], tokens: int) -> float:
    """FLOP of one sample's forward pass of a denoiser with this configuration (its config.json), counted on the meta
    device (no memory, no weights). A backward pass costs twice as much. Raises ModelError for an unknown network."""
    family = network_family(config)
    with torch.device("meta"):
        network = family.network.from_config(config)
        args, kwargs = family.example(network.config, 1, latent_shape, tokens)
        return _count(network, *args, **kwargs)


def judging_flops(config: dict, latent_shape: tuple[int, int, int], tokens: int) -> tuple[float, float]:
    """FLOP of one sample's judgement by the GAN head, and the head's own part of it: (features and head, head). Raises
    ModelError for a network that the head cannot read."""
    family = network_family(config)
    with torch.device("meta"):
        network = family.network.from_config(config)
        args, kwargs = family.example(network.config, 1, latent_shape, tokens)
        whole = _count(Discriminator(network, latent_shape, 0), *args, judge="only", **kwargs)
        shape = feature_shape(network, latent_shape)
        return whole, _count(Head(*shape), torch.empty(1, *shape))
