"""Counted, not guessed: the floating-point operations of a network."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.gan import Discriminator, Head, feature_shape


def _inputs(config: dict, latent_shape: tuple[int, int, int], tokens: int) -> dict:
    """Arguments of one sample's forward pass, on the present default device."""
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "encoder_hidden_states": torch.empty(1, tokens, config["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)},
    }


def _count(module: nn.Module, *args: object, **kwargs: object) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args, **kwargs)
    return float(counter.get_total_flops())


def forward_flops(config: dict, latent_shape: tuple[int, int, int], tokens: int) -> float:
    """FLOP of one sample's forward pass of a UNet with this configuration, counted on the meta device (no memory, no
    weights). A backward pass costs twice as much."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        x, t = torch.empty(1, *latent_shape), torch.zeros(1, dtype=torch.long)
        return _count(unet, x, t, **_inputs(unet.config, latent_shape, tokens))


def judging_flops(config: dict, latent_shape: tuple[int, int, int], tokens: int) -> tuple[float, float]:
    """FLOP of one sample's judgement by the GAN head, and the head's own part of it: (features and head, head)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        shape = feature_shape(unet, latent_shape)
        x, t = torch.empty(1, *latent_shape), torch.zeros(1, dtype=torch.long)
        whole = _count(Discriminator(unet, latent_shape, 0), x, t, "only", **_inputs(unet.config, latent_shape, tokens))
        return whole, _count(Head(*shape), torch.empty(1, *shape))
