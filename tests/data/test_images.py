"""Images decode to what a viewer shows."""

import io
import resource
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from data.images import ImageTooLarge, decode, resize_and_crop


def test_exif_orientation(encode):
    image = Image.new("RGB", (16, 32), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 16, 16))  # red on top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned 90 degrees clockwise
    decoded = decode(encode(image=image, form="jpeg", exif=exif, quality=95))
    assert decoded.shape == (3, 16, 32)
    assert decoded[0, 8, 28] > 200 and decoded[2, 8, 4] > 200  # red is on the right


def test_kinds_of_files(encode):
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0] * 256)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    cases = {
        "grey": (encode(image=Image.new("L", (8, 8), 70)), (70, 70, 70)),
        "1 bit": (encode(image=Image.new("1", (8, 8), 0)), (0, 0, 0)),
        "16 bit": (encode(image=Image.fromarray(np.full((8, 8), 70 * 257, np.uint16))), (70, 70, 70)),
        "palette": (encode(image=palette), (255, 0, 0)),
        "palette, transparent": (encode(image=palette, transparency=0), (255, 255, 255)),
        "alpha png": (encode(image=clear), (255, 255, 255)),
        "half alpha png": (encode(image=half), (255, 127, 127)),
        "alpha webp": (encode(image=clear, form="webp", lossless=True), (255, 255, 255)),
        "grey and alpha": (encode(image=Image.new("LA", (8, 8), (70, 0))), (255, 255, 255)),
        "webp": (encode((255, 0, 0), form="webp", lossless=True), (255, 0, 0)),
        "cmyk jpeg": (encode(image=Image.new("CMYK", (8, 8), (0, 255, 255, 128)), form="jpeg"), (127, 0, 0)),
    }
    for name, (raw, colour) in cases.items():
        image = decode(raw)
        assert image.dtype == torch.uint8 and image.shape == (3, 8, 8), name
        assert (image[:, 4, 4].int() - torch.tensor(colour)).abs().max() <= 3, (name, image[:, 4, 4])


def viewed(raw) -> torch.Tensor:
    """What a viewer shows on white: the first frame, upright."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGBA")
    shown = Image.new("RGBA", image.size, "white")
    shown.alpha_composite(image)
    return torch.from_numpy(np.array(shown.convert("RGB"))).permute(2, 0, 1)


def test_all_formats_as_a_viewer_shows_them(encode):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4, (6, 10, 3), dtype=np.uint8) * 85
    colour, frames = Image.fromarray(pixels), {"save_all": True, "append_images": [Image.new("RGB", (10, 6))]}
    grey, bits, palette = colour.convert("L"), colour.convert("1"), colour.quantize(4)
    clear = colour.copy()
    clear.putalpha(Image.fromarray(rng.integers(0, 256, (6, 10), dtype=np.uint8)))
    cases = {
        "grey with a transparent one": encode(image=grey, transparency=int(np.array(grey)[0, 0])),
        "colour with a transparent one": encode(image=colour, transparency=tuple(pixels[0, 0].tolist())),
        "black and white, white transparent": encode(image=bits, transparency=255),
        "palette of 2 bits": encode(image=palette, bits=2, transparency=bytes([0, 128, 255])),
        "bmp": encode(image=colour, form="bmp"),
        "tiff, cmyk": encode(image=colour.convert("CMYK"), form="tiff"),
        "tiff, alpha": encode(image=clear, form="tiff"),
        "gif, transparent": encode(image=palette, form="gif", transparency=1),
        "avif, alpha": encode(image=clear, form="avif", quality=100),
        "webp, damaged exif": encode(image=colour, form="webp", lossless=True, exif=b"no exif"),
    }
    for form, more in (
        ("gif", {}),
        ("webp", {"lossless": True}),
        ("png", {}),
        ("avif", {"quality": 100}),
        ("tiff", {}),
    ):
        cases[f"{form}, animated"] = encode(image=colour, form=form, **frames, **more)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form in ("webp", "png", "tiff"):
            more = {"lossless": True} if form == "webp" else {}
            cases[f"{form}, {orientation}"] = encode(image=clear, form=form, exif=exif.tobytes(), **more)
    for name, raw in cases.items():
        wanted = torch.from_numpy(pixels).permute(2, 0, 1) if "damaged" in name else viewed(raw)
        assert (decode(raw).int() - wanted.int()).abs().max() <= 1, name
    deep = np.full((4, 4), 70 * 257, np.uint16)
    deep[0] = 1000
    assert decode(encode(image=Image.fromarray(deep), transparency=1000))[0, :, 0].tolist() == [255, 70, 70, 70]
    assert decode(encode(image=Image.fromarray(deep), form="tiff"))[0, :, 0].tolist() == [3, 70, 70, 70]


def test_images_that_are_too_large_are_refused_before_they_are_decoded(encode):
    raw = bytearray(encode(form="jpeg"))
    at = raw.find(b"\xff\xc0")
    raw[at + 5 : at + 9] = b"\xff" * 4
    png = bytearray(encode())
    png[16:24] = struct.pack(">II", 60_000, 60_000)
    for large in (raw, png):
        with pytest.raises(ImageTooLarge):
            decode(bytes(large))


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_broken_files_raise(encode, form):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    raw = encode(image=Image.fromarray(pixels), form=form)
    for broken in (raw[: len(raw) // 2], b"not an image", raw[:20]):
        with pytest.raises(RuntimeError):
            decode(broken)


def test_the_crop_is_the_centre():
    image = torch.zeros(3, 8, 20, dtype=torch.uint8)
    image[:, :, 6:14] = 255
    square, corner = resize_and_crop(image, (8, 8))
    assert corner == (0, 6) and square.shape == (3, 8, 8) and square.dtype == torch.float32
    assert (square == 1).all()
    assert (resize_and_crop(torch.zeros(3, 8, 8, dtype=torch.uint8), (8, 8))[0] == -1).all()


def test_resizing_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 255, (48, 32, 3), dtype=np.uint8)
    square, corner = resize_and_crop(torch.from_numpy(pixels).permute(2, 0, 1), (16, 16))
    wanted = np.asarray(Image.fromarray(pixels).resize((16, 24), Image.Resampling.BICUBIC))[4:20]
    assert corner == (4, 0)
    difference = (square + 1) * 127.5 - torch.from_numpy(wanted.copy()).permute(2, 0, 1)
    assert difference.abs().max() <= 1.01


def whole(image, resolution):
    """Enlarged as a whole, then cropped."""
    height, width = image.shape[1:]
    scale = resolution / min(height, width)
    size = [max(round(height * scale), resolution), max(round(width * scale), resolution)]
    large = resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    top, left = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return large[:, top : top + resolution, left : left + resolution], (top, left)


def test_a_long_image_is_cropped_before_it_is_enlarged():
    """The result is the same: to the bit where a source pixel becomes a whole number of pixels."""
    rng = np.random.default_rng(0)
    for short, long, resolution in [
        (1, 333, 24),
        (2, 100, 24),
        (3, 101, 24),
        (5, 200, 16),
        (7, 600, 24),
        (20, 30, 24),
        (30, 600, 24),
    ]:
        for shape in ((3, short, long), (3, long, short)):
            image = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
            square, corner = resize_and_crop(image, (resolution, resolution))
            wanted, wanted_corner = whole(image, resolution)
            assert corner == wanted_corner and square.shape == (3, resolution, resolution)
            difference = ((square + 1) * 127.5 - wanted).abs().max()
            assert difference < (0.01 if resolution % short == 0 or long <= 16 * short else 2.01), (shape, difference)


def test_a_line_of_pixels_needs_no_gigabytes():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square, corner = resize_and_crop(torch.full((3, 1, 6000), 9, dtype=torch.uint8), (1024, 1024))
    assert (square == 9 / 127.5 - 1).all() and corner == (0, (6_144_000 - 1024) // 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB
