"""Counted, not guessed: the floating-point operations of a network."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.conditioning import Conditioning
from models.families import network_family


def forward_flops(config: dict, latent_shape: tuple[int, int, int], tokens: int) -> float:
    """FLOP of one sample's forward pass of a denoiser with this configuration (its config.json), counted on the meta
    device (no memory, no weights). A backward pass costs twice as much. Raises ModelError for an unknown network."""
    family = network_family(config)
    with torch.device("meta"):
        network = family.network.from_config(config)
        width, pooled = family.widths(network.config)
        text = torch.empty(1, tokens, width), None if pooled is None else torch.empty(1, pooled)
        cond = Conditioning(*text, torch.empty(1, 6), family=family.name)
        x, t = torch.empty(1, *latent_shape), torch.zeros(1, dtype=torch.long)
        arguments, named = family.inputs(x, t, cond)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(*arguments, **named)
    return float(counter.get_total_flops())
