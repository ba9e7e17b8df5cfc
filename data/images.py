"""Decoding, resizing and cropping of training images."""

import io
from math import gcd

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from data.buckets import Size

JPEG, PNG, RIFF = b"\xff\xd8\xff", b"\x89PNG", b"RIFF"
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types
WEBP_EXIF, WEBP_ANIMATED = 0x08, 0x02  # flags of WebP's VP8X chunk
MAX_PIXELS = 2 * 89_478_485  # above which Pillow refuses an image as a decompression bomb
COMPOSITE_ROWS = 256  # composited at a time, in float32
LONGEST = 16  # sides' ratio up to which a whole image is enlarged; a longer one only around its centre


class ImageTooLarge(RuntimeError):
    """The image has more than MAX_PIXELS pixels."""


def decode(raw: bytes) -> Tensor:
    """Decodes JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF to uint8 [3, H, W]: the first frame or page, EXIF orientation
    applied, transparency composited over white.

    Raises RuntimeError for broken, truncated or unknown data, and for images of more than MAX_PIXELS.
    """
    try:
        if raw.startswith(PNG):
            return _decode_png(raw)
        if raw.startswith(JPEG):
            _check_size(*_jpeg_size(raw))
            return _torchvision(raw, ImageReadMode.RGB)
        if raw.startswith(RIFF) and not _webp_needs_pillow(raw):
            return _over_white(_torchvision(raw, ImageReadMode.RGB_ALPHA))
        return _decode_with_pillow(raw)
    except RuntimeError:
        raise
    except Exception as error:  # Pillow raises nearly anything for damaged data
        raise RuntimeError(" ".join(str(error).split()) or type(error).__name__) from error


def _torchvision(raw: bytes, mode: ImageReadMode) -> Tensor:
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return decode_image(data, mode=mode, apply_exif_orientation=True)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageTooLarge(f"{width} x {height} pixels")


def _over_white(image: Tensor) -> Tensor:
    """uint8 [4, H, W] with opacity as the last channel, composited over white: uint8 [3, H, W]."""
    if image[3].min() == 255:
        return image[:3]
    parts = []
    for part in image.split(COMPOSITE_ROWS, dim=1):
        opacity = part[3:].float() / 255
        parts.append((part[:3] * opacity + 255 * (1 - opacity)).round().to(torch.uint8))
    return torch.cat(parts, dim=1)


def _decode_png(raw: bytes) -> Tensor:
    depth, kind = raw[24], raw[25]
    _check_size(int.from_bytes(raw[16:20]), int.from_bytes(raw[20:24]))
    clear = _png_transparency(raw)
    alpha = kind in (GREY_ALPHA, COLOUR_ALPHA) or (kind == PALETTE and clear is not None)
    image = _torchvision(raw, ImageReadMode.RGB_ALPHA if alpha else ImageReadMode.RGB)
    transparent = None
    if kind in (GREY, COLOUR) and clear is not None:  # torchvision ignores the transparent colour of these
        top = 2**depth - 1
        values = [(int.from_bytes(clear[i : i + 2]) & top) for i in range(0, len(clear) - 1, 2)]
        if depth < 8:
            values = [value * 255 // top for value in values]
        transparent = (image.to(torch.int32) == torch.tensor(values, dtype=torch.int32)[:, None, None]).all(0)
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    if transparent is not None:
        image[:, transparent] = 255
    return _over_white(image) if alpha else image


def _png_transparency(raw: bytes) -> bytes | None:
    """The contents of a PNG's tRNS chunk; None if it has none."""
    at = 8
    while at + 8 <= len(raw) and raw[at + 4 : at + 8] != b"IDAT":
        size = int.from_bytes(raw[at : at + 4])
        if raw[at + 4 : at + 8] == b"tRNS":
            return raw[at + 8 : at + 8 + size]
        at += size + 12
    return None


def _jpeg_size(raw: bytes) -> tuple[int, int]:
    """Width and height of a JPEG, from its frame header; (0, 0) if there is none."""
    at = 2
    while at + 9 <= len(raw) and raw[at] == 0xFF:
        marker = raw[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # these three are no frame headers
            return int.from_bytes(raw[at + 7 : at + 9]), int.from_bytes(raw[at + 5 : at + 7])
        at += 1 if marker == 0xFF else 2 + int.from_bytes(raw[at + 2 : at + 4])
    return 0, 0


def _webp_needs_pillow(raw: bytes) -> bool:
    """Whether a WebP is animated or has EXIF data: torchvision refuses the first and ignores the second."""
    return raw[12:16] == b"VP8X" and bool(raw[20] & (WEBP_EXIF | WEBP_ANIMATED))


def _decode_with_pillow(raw: bytes) -> Tensor:
    with Image.open(io.BytesIO(raw)) as image:
        _check_size(*image.size)
        if image.mode in ("I", "F"):
            raise RuntimeError("32 bits per value: their range is not known")
        for key in (
            "xmp",
            "XML:com.adobe.xmp",
        ):  # Pillow would believe its orientation, which torchvision does not read
            image.info.pop(key, None)
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:
            pass  # damaged EXIF data: a viewer shows the pixels as they are, and damaged pixels raise below
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        alpha = image.has_transparency_data
        pixels = torch.from_numpy(np.array(image.convert("RGBA" if alpha else "RGB")).transpose(2, 0, 1).copy())
    return _over_white(pixels) if alpha else pixels


def resize_and_crop(
    image: Tensor, size: Size, where: tuple[float, float] | None = None, flip: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """Resizes an image until it just covers a size (height, width), by antialiased bicubic, and crops it: uint8 [3, H, W] to
    float32 [3, height, width] in [-1, 1].

    where: of the crop among all possible ones, as shares of [0, 1) from the top and from the left; None is the centre. flip:
    mirrors it. Also returns the crop's corner (top, left) in pixels of the resized (and mirrored) image: SDXL is conditioned
    on it.
    """
    full = height, width = image.shape[1:]
    scale = max(size[0] / height, size[1] / width)
    cut = [0, 0]
    if scale != 1:
        full = max(round(height * scale), size[0]), max(round(width * scale), size[1])
        image, cut = _centre(image, size)
        kept = [side - 2 * off for side, off in zip(full, cut, strict=True)]
        image = resize(image, kept, interpolation=InterpolationMode.BICUBIC, antialias=True)
    spare = [image.shape[1] - size[0], image.shape[2] - size[1]]
    top, left = (
        (int(share * (room + 1)) for share, room in zip(where, spare, strict=True))
        if where
        else (s // 2 for s in spare)
    )
    part = image[:, top : top + size[0], left : left + size[1]]
    corner = (top + cut[0], left + cut[1]) if where else tuple((f - s) // 2 for f, s in zip(full, size, strict=True))
    if flip:
        part, corner = part.flip(2), (corner[0], full[1] - size[1] - corner[1])
    return part.float() / 127.5 - 1, corner


def _centre(image: Tensor, size: Size) -> tuple[Tensor, list[int]]:
    """An image without the ends of its long side, if it is to be enlarged and is longer than LONGEST times its other side:
    enlarged as a whole, 6000 x 1 pixels would take gigabytes.

    Also returns what is cut off each end of height and width, in pixels of the resized image: a whole number, so that the
    remaining pixels are resized as they would be in the whole image.
    """
    dim = int(image.shape[2] * size[0] > image.shape[1] * size[1])  # the one that is cropped
    short, long, target = image.shape[2 - dim], image.shape[1 + dim], size[1 - dim]
    step = short // gcd(short, target)
    steps = max(long - LONGEST * short, 0) // (2 * step)
    if short >= target or not steps:
        return image, [0, 0]
    cut = [0, 0]
    cut[dim] = steps * step * target // short
    return image.narrow(dim + 1, steps * step, long - 2 * steps * step), cut
