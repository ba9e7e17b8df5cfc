"""Decoding, resizing and cropping of training images."""

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

PNG, RIFF = b"\x89PNG", b"RIFF"


def _may_have_alpha(raw: bytes) -> bool:
    """Whether to request an alpha channel: torchvision returns none for JPEG, and an alpha of 1 for 1-bit PNG."""
    if raw.startswith(PNG):
        return raw[25:26] in (b"\x04", b"\x06") or b"tRNS" in raw[: raw.find(b"IDAT")]  # byte 25: the colour type
    return raw.startswith(RIFF)  # WebP


def decode(raw: bytes) -> Tensor:
    """Decodes image bytes to uint8 [3, H, W]: EXIF orientation applied, transparency composited over white.

    Raises RuntimeError for broken, truncated or unknown data.
    """
    alpha = _may_have_alpha(raw)
    mode = ImageReadMode.RGB_ALPHA if alpha else ImageReadMode.RGB
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    image = decode_image(data, mode=mode, apply_exif_orientation=True)
    if image.dtype == torch.uint16:  # 16-bit PNG
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    if alpha:
        colour, opacity = image[:3], image[3:]
        if opacity.min() == 255:
            return colour
        opacity = opacity.float() / 255
        image = (colour * opacity + 255 * (1 - opacity)).round().to(torch.uint8)
    return image


def resize_and_crop(image: Tensor, resolution: int) -> tuple[Tensor, tuple[int, int]]:
    """Resizes the short side to R (antialiased bicubic) and crops the centre: uint8 [3, H, W] to float32 [3, R, R] in
    [-1, 1].

    Also returns the crop's corner (top, left) in pixels of the resized image: SDXL is conditioned on it.
    """
    height, width = image.shape[1:]
    if min(height, width) != resolution:
        scale = resolution / min(height, width)
        size = [max(round(height * scale), resolution), max(round(width * scale), resolution)]
        image = resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    top, left = (image.shape[1] - resolution) // 2, (image.shape[2] - resolution) // 2
    square = image[:, top : top + resolution, left : left + resolution]
    return square.float() / 127.5 - 1, (top, left)
