"""Crops and resizes of the published protocols.

Resizes of uint8 images with Pillow round to 8 bits; those in torch do not. A protocol's numbers depend on which it
uses, so none of these functions may stand in for another.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import center_crop

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of red, green and blue in [0, 1]
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP, and of LAION's

Item, Result = TypeVar("Item"), TypeVar("Result")


def over_threads(fn: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """fn of each item, in order, on up to 8 threads: Pillow releases the interpreter lock while it resizes."""
    workers = min(8, len(items), len(os.sched_getaffinity(0)))
    if workers < 2:
        return [fn(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(fn, items))


def by_size(fn: Callable[[Tensor], Tensor], images: list[Tensor]) -> Tensor:
    """The results [B, ...] of fn, called once for each size among the images, with a stack [N, 3, H, W]."""
    groups: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        groups.setdefault(image.shape, []).append(place)
    rows = torch.cat([fn(torch.stack([images[place] for place in places])) for places in groups.values()])
    order = torch.tensor([place for places in groups.values() for place in places], device=rows.device)
    return rows[order.argsort()]


def to_pil(image: Tensor) -> Image.Image:
    """A uint8 image [3, H, W] as a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """A Pillow RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def pil_resize(image: Tensor, side: int, filter: Image.Resampling) -> Tensor:
    """A uint8 image [3, H, W] resized by Pillow to uint8 [3, side, side], whatever its aspect ratio, on its own device.
    Pillow widens the filter when it shrinks, and leaves an image of this size as it is."""
    if image.shape[1:] == (side, side):
        return image
    return from_pil(to_pil(image).resize((side, side), filter)).to(image.device)


@dataclass(frozen=True)
class Prepare:
    """What a protocol does to generated and real images alike before a network sees them.

    crop: "none" leaves an image as it is. "square" crops the centre to the short side and resizes it to `side` with
    Lanczos (DMD2, GigaGAN). "patch" crops side x side from the centre; an image with a shorter side stays whole, as in
    DMD2's evaluator. Centres are torchvision's, which rounds half pixels to even.
    """

    crop: Literal["none", "square", "patch"] = "none"
    side: int = 0

    def __call__(self, image: Tensor) -> Tensor:
        """A uint8 image [3, H, W] to uint8 [3, h, w] on the same device."""
        short = min(image.shape[1:])
        if self.crop == "square":
            return pil_resize(center_crop(image, [short, short]), self.side, Image.Resampling.LANCZOS)
        if self.crop == "patch" and short >= self.side:
            return center_crop(image, [self.side, self.side])
        return image


def clean_resize(images: list[Tensor], side: int = 299) -> Tensor:
    """uint8 images to float32 [B, 3, side, side] in 0..255, on their device, as clean-fid does (Parmar et al. 2022):
    bicubic with antialiasing in floating point, clamped and not rounded. clean-fid uses Pillow's mode F; the two differ
    by less than 0.002 grey levels."""

    def resize(stack: Tensor) -> Tensor:
        return functional.interpolate(stack.float(), size=(side, side), mode="bicubic", antialias=True).clamp(0, 255)

    if all(image.device.type == "cpu" for image in images):  # the floats of a whole batch do not fit its caches
        return torch.cat([resize(image[None]) for image in images])
    return by_size(resize, images)


def bilinear_resize(images: list[Tensor], side: int = 299) -> Tensor:
    """uint8 images to float32 [B, 3, side, side] in 0..1, on their device, as pytorch-fid does: bilinear without
    antialiasing, which aliases when it shrinks."""

    def resize(stack: Tensor) -> Tensor:
        return functional.interpolate(stack.float() / 255, size=(side, side), mode="bilinear")

    return by_size(resize, images)


def normalise(images: Tensor, moments: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Float images [B, 3, H, W] in 0..1, less a mean and divided by a standard deviation per channel."""
    mean, deviation = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in moments)
    return (images - mean) / deviation
