"""Counted, not guessed: the floating-point operations of a network."""

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(config: dict, latent_shape: tuple[int, int, int], tokens: int) -> float:
    """FLOP of one sample's forward pass of a UNet with this configuration, counted on the meta device (no memory, no
    weights). A backward pass costs twice as much."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        states = torch.empty(1, tokens, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            t = torch.zeros(1, dtype=torch.long)
            unet(torch.empty(1, *latent_shape), t, encoder_hidden_states=states, added_cond_kwargs=added)
    return float(counter.get_total_flops())
