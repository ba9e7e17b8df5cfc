"""A miniature SDXL pipeline, built offline: every part of the real one, small enough to train on two CPU cores."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.tokenizer import VOCABULARY, clip_tokenizer


class MiniatureSettings(BaseModel):
    """Sizes of the miniature. Images of `resolution` pixels become latents of half the side."""

    model_config = ConfigDict(extra="forbid")

    resolution: int = 8
    unet_channels: tuple[int, int] = (48, 96)
    vae_channels: tuple[int, int] = (32, 64)
    latent_channels: int = 4
    heads: int = 2
    text_widths: tuple[int, int] = (32, 32)  # of the two encoders; cross-attention sees their sum
    pooled: int = 32
    tokens: int = 16  # attention over 77 mostly padded tokens is wasted work here
    seed: int = 0


def _text_config(settings: MiniatureSettings, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=settings.pooled,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=settings.tokens,
        hidden_act="gelu",
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )


def _spread(encoder: nn.Module) -> None:
    """Random encoders stay frozen, so their captions must already lie apart. CLIP's initial weights are so small that
    every text state is nearly the same; unit-size embeddings and uniform attention carry each word everywhere."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("token_embedding.weight"):
                parameter.normal_(0, 1)
            elif name.endswith("position_embedding.weight"):
                parameter.normal_(0, 0.1)
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.normal_(0, 0.02)
            elif name.endswith(("v_proj.weight", "out_proj.weight")) or name.endswith("text_projection.weight"):
                parameter.normal_(0, 1 / parameter.shape[1] ** 0.5)


def build_miniature(settings: MiniatureSettings) -> StableDiffusionXLPipeline:
    """A whole pipeline with random weights: UNet with text_time conditioning, two CLIP text encoders with CLIP's real
    tokenizers, AutoencoderKL, SDXL's noise schedule. A function of the settings; the global generator is left alone."""
    side = settings.resolution // 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        unet = UNet2DConditionModel(
            sample_size=side,
            in_channels=settings.latent_channels,
            out_channels=settings.latent_channels,
            block_out_channels=settings.unet_channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=settings.heads,  # diffusers' name for the number of heads
            cross_attention_dim=sum(settings.text_widths),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=settings.pooled + 6 * 8,
        )
        vae = AutoencoderKL(
            block_out_channels=settings.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=settings.latent_channels,
            norm_num_groups=8,
            sample_size=settings.resolution,
            force_upcast=False,
        )
        encoders = [CLIPTextModel(_text_config(settings, settings.text_widths[0]))]
        encoders.append(CLIPTextModelWithProjection(_text_config(settings, settings.text_widths[1])))
        for encoder in encoders:
            _spread(encoder)
    # SDXL's schedule, as in its own scheduler_config.json.
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=clip_tokenizer(settings.tokens),
        tokenizer_2=clip_tokenizer(settings.tokens, pad_token="!"),
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
