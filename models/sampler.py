"""Captions to images, with one step or many; the network may be a plain one or an engine."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from models.denoise import predict_guided
from models.diffusion import Schedule
from models.multistep import Student
from models.offload import awake
from models.pipeline import load_schedule, load_vae
from models.text_encoder import TextEncoder

DECODED_PIXELS = 2 * 1024**2  # of the images that are encoded or decoded at once


class ImageNoise:
    """Noise of images by number: image i draws from a CPU generator with seed + i, first its start and then the noise of
    each later step, as a diffusers pipeline does with `torch.Generator("cpu").manual_seed(seed + i)`, on every machine
    alike."""

    def __init__(self, seed: int, indices: list[int], shape: tuple[int, ...], device: torch.device):
        self.generators = [torch.Generator("cpu").manual_seed(seed + i) for i in indices]
        self.shape, self.device = shape, device

    def draw(self) -> Tensor:
        """The next noise of every image, [B, *shape]."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 by truncation of (x + 1) * 127.5, the protocol of the published numbers."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)


class Sampler:
    """Everything but the denoising network: text encoders, schedule and decoder of one pipeline folder."""

    def __init__(
        self, text: TextEncoder, vae: AutoencoderKL, schedule: Schedule, scheduler_config: dict, resolution: int
    ):
        self.text, self.vae, self.schedule, self.resolution = text, vae, schedule, resolution
        self.scheduler_config = scheduler_config

    @classmethod
    def load(
        cls,
        pipeline: Path,
        resolution: int,
        dtype: torch.dtype,
        device: torch.device,
        variant: str = "",
        shift: float = 1.0,
    ) -> "Sampler":
        """Loads the parts from a pipeline folder; the decoder stays in float32 (SDXL's overflows in half).

        variant: of the weight files. shift: of the timesteps that the schedule draws for training."""
        text = TextEncoder(pipeline, dtype, device, variant)
        vae = load_vae(pipeline, variant=variant).to(device)
        schedule = load_schedule(pipeline, shift).to(device)
        return cls(text, vae, schedule, dict(text.parts.scheduler.config), resolution)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = self.resolution // factor
        return self.vae.config.latent_channels, side, side

    @property
    def at_once(self) -> int:
        """Images that the autoencoder takes at once: in float32 SDXL's holds some 2 GB an image of 1024 pixels."""
        return max(1, DECODED_PIXELS // self.resolution**2)

    def scaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents as the diffusion model sees them: (latents - shift) * scale; SD3's have a shift."""
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The diffusion model's latents [B, C, h, w] to uint8 images [B, 3, H, W]."""
        latents = latents.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        with awake([self.vae], latents.device):
            return torch.cat([to_uint8(self.vae.decode(z, return_dict=False)[0]) for z in latents.split(self.at_once)])

    @torch.no_grad()
    def encode(self, images: Tensor, eps: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1], drawn from the autoencoder's posterior with the
        standard normal eps [B, C, h, w]."""
        mean, std = self.posterior(images)
        return self.drawn(mean, std, eps)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, C, h, w] of the autoencoder's own, unscaled latents of images [B, 3, H, W]."""
        with awake([self.vae], images.device):
            parts = [self.vae.encode(part).latent_dist for part in images.split(self.at_once)]
        return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])

    def drawn(self, mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
        """Scaled latents drawn from a posterior with the standard normal eps, all [B, C, h, w]."""
        return self.scaled(mean + std * eps)

    @torch.no_grad()
    def student(self, net: nn.Module, captions: list[str], noise: ImageNoise, timesteps: tuple[int, ...]) -> Tensor:
        """uint8 images [B, 3, H, W] of a student that steps at `timesteps`."""
        cond = self.text.encode(captions, self.resolution)
        student = Student(self.schedule, timesteps)
        return self.decode(student.trajectory(net, cond, lambda _: noise.draw(), len(timesteps))[-1])

    @torch.no_grad()
    def many_steps(self, net: nn.Module, captions: list[str], z: Tensor, steps: int, guidance_scale: float) -> Tensor:
        """uint8 images [B, 3, H, W] of a diffusion model from z: deterministic DDIM (Song et al. 2021), or Euler's
        steps of a flow, spaced as the pipeline's scheduler says."""
        if self.schedule.prediction == "flow":
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler_config)
        else:
            scheduler = DDIMScheduler.from_config(self.scheduler_config, clip_sample=False)
        scheduler.set_timesteps(steps)
        cond = self.text.encode(captions, self.resolution)
        x = z
        for t in scheduler.timesteps:
            prediction, _ = predict_guided(net, x, t.to(x.device).expand(len(x)), cond, guidance_scale)
            x = scheduler.step(prediction, t, x, return_dict=False)[0]
        return self.decode(x)
