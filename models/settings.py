"""The sections of a run's configuration that networks own. No torch here: login nodes read configurations too."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# DMD2's modules for SDXL (main/sd_unified_model.py): attention and its projections, feed-forward, every convolution of
# the residual blocks and between the levels, and the timestep's projections. That is all a UNet computes with, except its
# first and last layer and the embeddings: a one-step generator has to change its convolutions too.
LORA_TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut downsamplers.0.conv "
    "upsamplers.0.conv time_emb_proj"
).split()


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class GanSettings(_Settings):
    """The GAN term (DMD2, section 4.3): a classifier head on the fake score's features. Weights are DMD2's for SDXL."""

    enabled: bool = False
    """adds the term"""
    generator_weight: float = Field(5e-3, ge=0)
    """weight of the generator's loss"""
    head_weight: float = Field(1e-2, gt=0)
    """weight of the head's loss"""
    timesteps: tuple[float, float] = (0.0, 1.0)
    """range of timesteps that samples are noised to for the head, as shares of the schedule"""
    shared_pass: bool = True
    """the head classifies generated samples in the fake score's regular passes, at their x_t, instead of in extra passes with
    their own noise: the same losses in expectation (the generator's over backtrack.timesteps), a quarter less
    computation; it needs all timesteps"""

    @model_validator(mode="after")
    def _range(self) -> "GanSettings":
        low, high = self.timesteps
        if not 0 <= low < high <= 1:
            raise ValueError(f"timesteps {list(self.timesteps)} must be shares of the schedule, 0 <= low < high <= 1")
        if self.shared_pass and (low, high) != (0.0, 1.0):
            raise ValueError(
                "shared_pass classifies samples at the fake score's own timesteps, which are all of [0.0, 1.0]: set "
                "gan.shared_pass=false for other gan.timesteps"
            )
        return self


class LoraSettings(_Settings):
    """LoRA on generator, fake score and path nodes."""

    rank: int = Field(0, ge=0)
    """rank of the adapters; 0 trains whole networks (DMD2's LoRA script for SDXL has 64)"""
    alpha: float | None = Field(None, gt=0)
    """the update is scaled by alpha / rank; null is the rank itself, a scale of 1 (DMD2 has 8 at rank 64)"""
    targets: list[str] = LORA_TARGETS
    """endings of the module names that get an adapter; the default is DMD2's list for SDXL"""

    def identity(self) -> dict:
        """What two adapters must have in common for the weights of one to fit, and mean the same, on the other."""
        return {"rank": self.rank, "alpha": self.alpha or float(self.rank), "targets": sorted(set(self.targets))}


class MiniatureSettings(_Settings):
    """The miniature pipeline. Each level of the autoencoder after the first halves the side of the latents, and each level
    of the UNet after the first that of its features."""

    family: Literal["sdxl", "sd15", "sd21", "sd3"] = "sdxl"
    """sdxl, sd15 (epsilon), sd21 (v prediction) or sd3 (a transformer with flow prediction)"""
    resolution: int = 8
    """side of the images, in pixels"""
    unet_channels: tuple[int, ...] = Field((48, 96), min_length=1)
    """channels of the UNet's levels, all but the first with attention; the first is the width of an sd3 transformer"""
    vae_channels: tuple[int, ...] = Field((32, 64), min_length=1)
    """channels of the autoencoder's levels"""
    latent_channels: int = 4
    """channels of the latents"""
    heads: int = 2
    """attention heads"""
    text_widths: tuple[int, int] = (32, 32)
    """widths of the two text encoders; cross-attention sees their sum"""
    pooled: int = 32
    """width of the pooled text"""
    tokens: int = 16
    """length of a caption in tokens; attention over 77 mostly padded tokens is wasted work here"""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """seed of the initial weights"""

    @property
    def latent_side(self) -> int:
        """Side of the latents."""
        return self.resolution // 2 ** (len(self.vae_channels) - 1)

    @field_validator("unet_channels", "vae_channels")
    @classmethod
    def _groups(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(channels < 8 or channels % 8 for channels in value):
            raise ValueError(f"{list(value)} must be multiples of 8, the number of normalisation groups")
        return value

    @model_validator(mode="after")
    def _sides(self) -> "MiniatureSettings":
        levels = len(self.vae_channels) + (1 if self.family == "sd3" else len(self.unet_channels) - 1) - 1
        if self.resolution % 2**levels:
            raise ValueError(
                f"resolution={self.resolution} is not a multiple of {2**levels}, which vae_channels={list(self.vae_channels)} and "
                + (
                    "patches of two latents need"
                    if self.family == "sd3"
                    else f"unet_channels={list(self.unet_channels)} need"
                )
            )
        return self
