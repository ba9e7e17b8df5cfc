"""Sample grids while a stage trains: the same captions and noise at every step. With aspect-ratio buckets, all of
them in turn."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.utils import make_grid

from data.sources import Source
from models.sampler import ImageNoise, Sampler
from trainer.distributed.world import gather_rows
from trainer.training.run import Run

IMAGES = 32
GREY = 128


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
    used = [bucket for bucket, count in enumerate(dataset.counts) if count]
    shown: list[Tensor | None] = [None] * IMAGES

    def caption(number: int, bucket: int) -> str:
        # Of the bucket's own samples, and without buckets simply the first ones.
        place = number // len(used) if len(used) > 1 else number % len(dataset)
        return prompts[number % len(prompts)] if prompts else dataset.example(place, bucket)["caption"]

    for turn, bucket in enumerate(used[:IMAGES]):
        numbers = range(turn, IMAGES, len(used))  # the buckets in turn
        shape = sampler.shape_of(dataset.shapes[bucket])
        share, made = -(-len(numbers) // world.size), []
        mine = [numbers[(world.rank * share + i) % len(numbers)] for i in range(share)]
        for first in range(0, share, micro):
            index = mine[first : first + micro]
            noise = ImageNoise(run.settings.seed, index, shape, world.device)
            made.append(make([caption(i, bucket) for i in index], noise))
        images = gather_rows(torch.cat(made), world)[: len(numbers)]
        for number, image in zip(numbers, images, strict=True):
            shown[number] = image
    return grid(shown, run.settings.sample.enlarge)


def on_canvas(images: Sequence[Tensor]) -> Tensor:
    """uint8 images [3, h, w] of several sizes as one tensor [N, 3, H, W], each in the middle of a grey canvas."""
    height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
    if all(image.shape[1:] == (height, width) for image in images):
        return torch.stack(list(images))
    out = torch.full((len(images), 3, height, width), GREY, dtype=torch.uint8)
    for canvas, image in zip(out, images, strict=True):
        top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
        canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return out


def grid(images: Sequence[Tensor], enlarge: int = 1, columns: int = 8) -> Tensor:
    """uint8 images [3, H, W] as one grid [3, H', W'] in host memory; `enlarge` repeats the pixels of tiny images."""
    images = on_canvas([image.cpu() for image in images])
    if enlarge > 1:
        images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return make_grid(images, nrow=columns, padding=2, pad_value=GREY)
