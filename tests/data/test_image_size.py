"""The size of an image from its header is that of the decoded image."""

import os

import pytest
from PIL import Image

from data.image_size import image_size
from data.images import decode


def read_size(tmp_path, raw):
    """From the middle of a file, as in a shard."""
    file = tmp_path / "shard"
    file.write_bytes(b"before" + raw + b"after")
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return image_size(descriptor, 6, len(raw))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "tiff", "gif", "bmp", "avif"])
def test_sizes_of_every_form_and_orientation(tmp_path, encode, form):
    for mode in ("RGB", "L", "P", "RGBA", "CMYK", "I;16"):
        image = Image.new(mode, (30, 20))
        try:
            raw = encode(image=image, form=form)
        except (OSError, ValueError):
            continue  # a form without this mode
        assert read_size(tmp_path, raw) == tuple(decode(raw).shape[1:]) == (20, 30), mode
    for orientation in range(1, 9) if form not in ("gif", "bmp") else ():
        exif = Image.Exif()
        exif[0x0112] = orientation
        raw = encode(image=Image.new("RGB", (30, 20)), form=form, exif=exif.tobytes())
        assert read_size(tmp_path, raw) == tuple(decode(raw).shape[1:]), orientation


def test_damaged_headers(tmp_path, encode):
    raw = encode(size=(30, 20))
    huge = bytearray(raw)
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    for broken in (b"", b"no image", raw[:20], bytes(huge)):
        with pytest.raises(ValueError):
            read_size(tmp_path, broken)
    assert read_size(tmp_path, raw[:-20]) == (20, 30)  # truncated behind its header: found when it is read


def test_only_the_header_is_read(tmp_path, monkeypatch):
    noise = Image.effect_noise((900, 900), 90).convert("RGB")
    noise.save(tmp_path / "large.png")
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: read.append(len(pread(*args))) or pread(*args))
    assert read_size(tmp_path, (tmp_path / "large.png").read_bytes()) == (900, 900)
    assert sum(read) <= 1 << 15 < (tmp_path / "large.png").stat().st_size / 10
