"""Sampling of images from captions, in few or many steps, with a plain network or an engine."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from models.denoise import predict_guided
from models.diffusion import Schedule
from models.errors import ModelError
from models.multistep import Student
from models.offload import on_device
from models.pipeline import load_schedule, load_vae
from models.text_encoder import Size, TextEncoder

LATER = 1 << 32  # between the seeds of an image's first noise and of its later ones, where batches draw the first
VAE_PIXELS = 1024**2  # of the images that are encoded or decoded in one call


class ImageNoise:
    """Noise by image number: image i draws its initial noise, and then that of each later step, from a CPU generator
    with seed + i, on every machine alike, as a diffusers pipeline does with `torch.Generator("cpu")`.

    kind: "image" is that. Published protocols have others: "device" uses generators of the device; "batch-K" draws the
    initial noise of K images at a time, as rows of a CPU generator with seed + i // K.
    """

    def __init__(
        self, seed: int, indices: list[int], shape: tuple[int, ...], device: torch.device, kind: str = "image"
    ):
        where = device if kind == "device" else torch.device("cpu")
        batches = kind.startswith("batch-")
        later = LATER if batches else 0  # else an image's next noise would be another one's first
        self.generators = [torch.Generator(where).manual_seed(seed + i + later) for i in indices]
        self.shape, self.device, self.where = shape, device, where
        self.first = None
        if batches:
            size = int(kind.removeprefix("batch-"))
            self.first = torch.stack([self._row(seed, i, size) for i in indices])

    def _row(self, seed: int, index: int, size: int) -> Tensor:
        """An image's row of its batch's noise; later rows do not change earlier ones, so they are not drawn."""
        batch, row = divmod(index, size)
        return torch.randn(row + 1, *self.shape, generator=torch.Generator("cpu").manual_seed(seed + batch))[row]

    def draw(self) -> Tensor:
        """The next noise of every image, [B, *shape]."""
        if self.first is not None:
            noise, self.first = self.first, None
        else:
            noise = torch.stack([torch.randn(self.shape, generator=g, device=self.where) for g in self.generators])
        return noise.to(self.device)


def to_uint8(images: Tensor, rounded: bool = False) -> Tensor:
    """Images in [-1, 1] to uint8, truncating (x + 1) * 127.5 as DMD2's evaluation does, or rounding."""
    return ((images.float() + 1) * 127.5 + (0.5 if rounded else 0.0)).clamp(0, 255).to(torch.uint8)


class Sampler:
    """Everything for sampling but the denoiser: text encoders, schedule and autoencoder of a pipeline folder."""

    def __init__(self, text: TextEncoder, vae: AutoencoderKL, schedule: Schedule, scheduler_config: dict, size: Size):
        self.text, self.vae, self.schedule, self.size = text, vae, schedule, size
        self.scheduler_config = scheduler_config
        self.rounded = False  # how images become uint8

    @classmethod
    def load(
        cls,
        pipeline: Path,
        size: Size,
        dtype: torch.dtype,
        device: torch.device,
        variant: str = "",
        shift: float = 1.0,
    ) -> "Sampler":
        """Loads the parts of a pipeline folder. The autoencoder stays in float32 (SDXL's overflows in half precision).

        size: height and width in pixels of images for which no other is asked. variant: of the weight files. shift: of the
        training timesteps."""
        text = TextEncoder(pipeline, dtype, device, variant)
        vae = load_vae(pipeline, variant=variant).to(device)
        schedule = load_schedule(pipeline, shift).to(device)
        return cls(text, vae, schedule, dict(text.parts.scheduler.config), size)

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of the default size."""
        return self.shape_of(self.size)

    def shape_of(self, size: Size) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of a size (height, width) in pixels."""
        return self.vae.config.latent_channels, size[0] // self.factor, size[1] // self.factor

    def size_of(self, latents: Tensor) -> Size:
        """Height and width in pixels of the images of latents [B, C, h, w]."""
        return latents.shape[2] * self.factor, latents.shape[3] * self.factor

    @staticmethod
    def _per_call(size: Size) -> int:
        """Images per autoencoder call: SDXL's needs about 2.7 GB to encode one of 1024 pixels in float32."""
        return max(1, VAE_PIXELS // (size[0] * size[1]))

    def scale(self, latents: Tensor) -> Tensor:
        """The diffusion model's latents from the autoencoder's: (latents - shift) * scale; only SD3's have a shift."""
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes the diffusion model's latents [B, C, h, w] to uint8 images [B, 3, H, W]."""
        latents = latents.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        parts = latents.split(self._per_call(self.size_of(latents)))
        with on_device([self.vae], latents.device):
            images = [to_uint8(self.vae.decode(z, return_dict=False)[0], self.rounded) for z in parts]
        return torch.cat(images)

    @torch.no_grad()
    def encode(self, images: Tensor, eps: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1], drawn from the autoencoder's posterior with
        standard normal eps [B, C, h, w]."""
        return self.draw_latents(*self.posterior(images), eps)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, C, h, w] of the unscaled latents of images [B, 3, H, W]."""
        with on_device([self.vae], images.device):
            parts = [
                self.vae.encode(part).latent_dist for part in images.split(self._per_call(tuple(images.shape[2:])))
            ]
        return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])

    def draw_latents(self, mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
        """Scaled latents drawn from a posterior with standard normal eps, all [B, C, h, w]."""
        return self.scale(mean + std * eps)

    @torch.no_grad()
    def generator_images(
        self, net: nn.Module, captions: list[str], noise: ImageNoise, timesteps: tuple[int, ...]
    ) -> Tensor:
        """uint8 images [B, 3, H, W] from a generator with steps at `timesteps`, of the size that the noise is for."""
        _, height, width = noise.shape
        cond = self.text.encode(captions, (height * self.factor, width * self.factor))
        student = Student(self.schedule, timesteps)
        return self.decode(student.trajectory(net, cond, lambda _: noise.draw(), len(timesteps))[-1])

    def scheduler(self, steps: int) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
        """The scheduler that samples a diffusion model in this many steps. Raises ModelError for more steps than a schedule
        with betas has."""
        if self.schedule.prediction == "flow":
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler_config)
        elif steps > (most := self.schedule.steps):
            raise ModelError(f"sample.steps={steps}: the pipeline's schedule has {most} timesteps: set at most {most}")
        else:
            scheduler = DDIMScheduler.from_config(self.scheduler_config, clip_sample=False)
        scheduler.set_timesteps(steps)
        return scheduler

    @torch.no_grad()
    def diffusion_images(
        self, net: nn.Module, captions: list[str], z: Tensor, steps: int, guidance_scale: float
    ) -> Tensor:
        """uint8 images [B, 3, H, W] from a diffusion model, starting at z: deterministic DDIM (Song et al. 2021), or
        Euler steps for a flow, spaced as by the pipeline's scheduler."""
        scheduler = self.scheduler(steps)
        cond = self.text.encode(captions, self.size_of(z))
        x = z
        for t in scheduler.timesteps:
            prediction, _ = predict_guided(net, x, t.to(x.device).expand(len(x)), cond, guidance_scale)
            x = scheduler.step(prediction, t, x, return_dict=False)[0]
        return self.decode(x)
