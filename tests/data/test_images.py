"""Images decode to what a viewer shows."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import decode, resize_and_crop


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
    square, corner = resize_and_crop(image, 8)
    assert corner == (0, 6) and square.shape == (3, 8, 8) and square.dtype == torch.float32
    assert (square == 1).all()
    assert (resize_and_crop(torch.zeros(3, 8, 8, dtype=torch.uint8), 8)[0] == -1).all()


def test_resizing_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 255, (48, 32, 3), dtype=np.uint8)
    square, corner = resize_and_crop(torch.from_numpy(pixels).permute(2, 0, 1), 16)
    wanted = np.asarray(Image.fromarray(pixels).resize((16, 24), Image.Resampling.BICUBIC))[4:20]
    assert corner == (4, 0)
    difference = (square + 1) * 127.5 - torch.from_numpy(wanted.copy()).permute(2, 0, 1)
    assert difference.abs().max() <= 1.01
