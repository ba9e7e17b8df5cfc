"""Sample grids while a stage trains: the same captions and noise at every step."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.utils import make_grid

from data.sources import Source
from models.sampler import ImageNoise, Sampler
from trainer.distributed.world import gather_rows
from trainer.training.run import Run

IMAGES = 32


def preview_grid(
    run: Run,
    dataset: Source,
    sampler: Sampler,
    micro: int,
    make: Callable[[list[str], ImageNoise], Tensor],
) -> Tensor:
    """A uint8 grid [3, H, W] of IMAGES images. Each rank makes its share, a micro-batch at a time: all at once would not
    fit beside the roles.

    make: uint8 images [B, 3, H, W] of B captions. Every rank must call this, and calls `make` equally often.
    """
    world, prompts = run.world, run.settings.sample.prompts

    def caption(number: int) -> str:
        return prompts[number % len(prompts)] if prompts else dataset[number % len(dataset)]["caption"]

    share, made = -(-IMAGES // world.size), []
    mine = [(world.rank * share + i) % IMAGES for i in range(share)]
    for first in range(0, share, micro):
        index = mine[first : first + micro]
        noise = ImageNoise(run.settings.seed, index, sampler.latent_shape, world.device)
        made.append(make([caption(i) for i in index], noise))
    return grid(gather_rows(torch.cat(made), world)[:IMAGES], run.settings.sample.enlarge)


def grid(images: Tensor, enlarge: int = 1, columns: int = 8) -> Tensor:
    """uint8 images [N, 3, H, W] as one grid [3, H', W'] in host memory; `enlarge` repeats the pixels of tiny images."""
    images = images.cpu()
    if enlarge > 1:
        images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return make_grid(images, nrow=columns, padding=2, pad_value=128)
