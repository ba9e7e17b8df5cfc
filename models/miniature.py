"""Miniature pipelines, built offline: all parts of the real ones, small enough to train on two CPU cores."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from models.settings import MiniatureSettings
from models.tokenizer import VOCABULARY, clip_tokenizer, letter_tokenizer


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


def _init_text_encoder(encoder: nn.Module) -> None:
    """Initialises a text encoder that stays frozen, so that different captions have different states. CLIP's initial
    weights are so small that all states are nearly equal; unit embeddings and uniform attention mix every word in."""
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


def _unet(settings: MiniatureSettings) -> UNet2DConditionModel:
    """SDXL's UNet with text_time conditioning, or Stable Diffusion's without."""
    if settings.family == "sdxl":
        added = {
            "cross_attention_dim": sum(settings.text_widths),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": settings.pooled + 6 * 8,
        }
    else:
        added = {"cross_attention_dim": settings.text_widths[0]}
    levels = len(settings.unet_channels)
    return UNet2DConditionModel(
        sample_size=settings.latent_side,
        in_channels=settings.latent_channels,
        out_channels=settings.latent_channels,
        block_out_channels=settings.unet_channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=settings.heads,  # diffusers' name for the number of heads
        use_linear_projection=True,
        **added,
    )


def _transformer(settings: MiniatureSettings) -> SD3Transformer2DModel:
    width = settings.unet_channels[0]
    return SD3Transformer2DModel(
        sample_size=settings.latent_side,
        patch_size=2,
        in_channels=settings.latent_channels,
        out_channels=settings.latent_channels,
        num_layers=2,
        attention_head_dim=width // settings.heads,
        num_attention_heads=settings.heads,
        joint_attention_dim=sum(settings.text_widths),
        caption_projection_dim=width,
        pooled_projection_dim=2 * settings.pooled,
        pos_embed_max_size=settings.latent_side // 2,
    )


def _t5(settings: MiniatureSettings, vocabulary: int) -> T5EncoderModel:
    width = sum(settings.text_widths)
    config = T5Config(vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def _vae(settings: MiniatureSettings) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=settings.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(settings.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(settings.vae_channels),
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=8,
        sample_size=settings.resolution,
        shift_factor=0.0609 if settings.family == "sd3" else None,  # SD3's
        force_upcast=False,
    )


def _scheduler(settings: MiniatureSettings) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler of the real models' scheduler_config.json; SDXL and Stable Diffusion share one noise schedule."""
    if settings.family == "sd3":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="leading",
        prediction_type="v_prediction" if settings.family == "sd21" else "epsilon",
    )  # fmt: skip


def build_miniature(settings: MiniatureSettings) -> DiffusionPipeline:
    """A complete pipeline with random weights: denoiser, AutoencoderKL, text encoders with CLIP's real tokenizers, and
    the family's noise schedule. A function of the settings; does not touch the global random generator."""
    one_encoder, first = settings.family in ("sd15", "sd21"), settings.text_widths[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = _transformer(settings) if settings.family == "sd3" else _unet(settings)
        vae = _vae(settings)
        plain = CLIPTextModelWithProjection if settings.family == "sd3" else CLIPTextModel
        encoders = [plain(_text_config(settings, first))]
        if not one_encoder:
            encoders.append(CLIPTextModelWithProjection(_text_config(settings, settings.text_widths[1])))
        for encoder in encoders:
            _init_text_encoder(encoder)
        letters = letter_tokenizer(256)
        t5 = _t5(settings, len(letters)) if settings.family == "sd3" else None
    parts = {"vae": vae, "scheduler": _scheduler(settings)}
    parts |= {"text_encoder": encoders[0], "tokenizer": clip_tokenizer(settings.tokens)}
    if one_encoder:
        parts |= dict.fromkeys(("safety_checker", "feature_extractor")) | {"requires_safety_checker": False}
        return StableDiffusionPipeline(unet=network, **parts)
    parts |= {"text_encoder_2": encoders[1], "tokenizer_2": clip_tokenizer(settings.tokens, pad_token="!")}
    if settings.family == "sd3":
        return StableDiffusion3Pipeline(transformer=network, text_encoder_3=t5, tokenizer_3=letters, **parts)
    return StableDiffusionXLPipeline(unet=network, force_zeros_for_empty_prompt=True, add_watermarker=False, **parts)
