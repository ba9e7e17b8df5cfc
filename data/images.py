"""Bytes to training images."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image


def decode(raw: bytes) -> Tensor:
    """An encoded image to uint8 [3, H, W], upright (EXIF), transparency over white. Raises RuntimeError if it is
    broken or truncated."""
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    if raw[:2] == b"\xff\xd8":  # JPEG: four channels are CMYK there, not transparency
        return decode_image(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    image = decode_image(data, mode=ImageReadMode.UNCHANGED, apply_exif_orientation=True)
    if image.dtype != torch.uint8:
        return decode_image(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    if image.shape[0] in (2, 4):
        alpha = image[-1:].float() / 255
        image = (image[:-1] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return image.expand(3, -1, -1)


def fit(image: Tensor, resolution: int) -> tuple[Tensor, tuple[int, int]]:
    """uint8 [3, H, W] to float32 [3, R, R] in [-1, 1]: the short side resized to R (antialiased bicubic), centre crop.

    Returns the image and the crop's corner (top, left) in pixels of the resized image.
    """
    height, width = image.shape[1:]
    values = image.float()
    if min(height, width) != resolution:
        scale = resolution / min(height, width)
        size = max(round(height * scale), resolution), max(round(width * scale), resolution)
        values = F.interpolate(values[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(
            0, 255
        )
    top, left = (values.shape[1] - resolution) // 2, (values.shape[2] - resolution) // 2
    values = values[:, top : top + resolution, left : left + resolution]
    return values / 127.5 - 1, (top, left)
