"""The size of an image from its header: no pixel is decoded, and little more than the header is read."""

import io
import os
import warnings

from PIL import ExifTags, Image

from data.images import MAX_PIXELS

BUFFER = 1 << 14  # bytes per read
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


class FilePart(io.RawIOBase):
    """Bytes of an open file, as a file of their own."""

    def __init__(self, descriptor: int, offset: int, size: int):
        self._descriptor, self._offset, self._size, self._at = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        want = max(min(len(buffer), self._size - self._at), 0)
        raw = os.pread(self._descriptor, want, self._offset + self._at)
        buffer[: len(raw)] = raw
        self._at += len(raw)
        return len(raw)


def image_size(descriptor: int, offset: int, size: int) -> tuple[int, int]:
    """Height and width that data.images.decode gives the image in these bytes of an open file. Raises ValueError if its
    header is damaged or unknown, or says that it is too large to decode; OSError if it cannot be read."""
    if size <= 0:
        raise ValueError("no image")
    part = io.BufferedReader(FilePart(descriptor, offset, size), BUFFER)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(part) as image:
                width, height = image.size
                turned = _orientation(image) in TURNED
    except Exception as error:  # Pillow raises nearly anything for damaged data
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels")
    return (width, height) if turned else (height, width)


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data before the pixels, as the decoders read it."""
    if image.format == "TIFF":
        return 1  # Pillow's size has it already
    try:
        found = Image.Exif()  # image.getexif() would also believe XMP, which the decoders do not read
        found.load(image.info.get("exif") or b"")
        return found.get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1  # damaged EXIF data: the image is shown as it is
