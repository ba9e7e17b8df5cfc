"""What the GAN term's real images cost: without encoded shards, the autoencoder encodes them at every fake-score update."""

from dataclasses import dataclass
from functools import lru_cache
from json import dumps, loads

import torch
from diffusers import AutoencoderKL

from data.buckets import Size
from data.errors import DataError
from data.settings import DataSettings
from data.sources import encoding_of_training, names_prompts
from models.architecture import Architecture
from models.profile import PeakMemory, count_flops
from models.sampler import VAE_PIXELS
from trainer.config.schema import RunSettings


@dataclass(frozen=True)
class EncodingCost:
    """Of one image: FLOP, and the bytes in use at the peak, without weights; both in float32."""

    flops: float
    peak: int


def encodes_images(settings: RunSettings) -> bool:
    """Whether backtracking encodes images in its steps: with the GAN term, unless the shards hold latents. Shards that are
    not there yet count as plain ones."""
    if not settings.gan.enabled or settings.data.cached == "require":
        return False
    if settings.data.cached == "off":
        return True
    try:
        return encoding_of_training(settings.data) is None
    except DataError:
        return True


def largest_size(data: DataSettings) -> Size:
    """Height and width in pixels of the largest images: with aspect-ratio buckets they decide what fits, and the others cost
    hardly less."""
    return max(data.shapes, key=lambda size: size[0] * size[1])


def reads(settings: RunSettings, stage: str) -> str:
    """What a stage reads from `data.train`. Raises DataError if that names prompts alone, and the stage needs images."""
    if stage != "backtrack" or not settings.gan.enabled:
        return "captions only: a file of prompts suffices"
    if names_prompts(settings.data.train, "data.train"):
        raise DataError(
            f"data.train={settings.data.train} holds prompts alone, but the GAN term needs images: name shards of captioned "
            "images, or set gan.enabled=false"
        )
    return "captions, and images or latents for the GAN term"


def images_per_call(size: Size, micro: int) -> int:
    """Images of a micro-batch that the autoencoder encodes at once."""
    return min(micro, max(1, VAE_PIXELS // (size[0] * size[1])))


def encoding_cost(architecture: Architecture, size: Size) -> EncodingCost:
    """Measured on the meta device."""
    return _measured(dumps(architecture.vae, sort_keys=True), size)


@lru_cache
def _measured(config: str, size: Size) -> EncodingCost:
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL.from_config(loads(config))
        image = torch.empty(1, vae.config.in_channels, *size)
        with PeakMemory(list(vae.parameters())) as memory:
            vae.encode(image)
        return EncodingCost(count_flops(lambda: vae.encode(image)), memory.peak)
