"""safetensors files by ranges of elements, with plain reads and writes.

The library maps files: a tensor of it is read page by page at its first use, wherever that is, counts as memory of the
process, and a disk error there is a SIGBUS. Here a read is finished when it returns, goes straight to where its bytes are
wanted, and fails as an exception; a write is hashed on its way.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from models.errors import ModelError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 1 << 26  # bytes written and hashed at a time
LARGEST_HEADER = 100_000_000  # the format's own limit


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class TensorFile:
    """An open safetensors file: the shapes and dtypes of its tensors, and ranges of their elements.

    Raises ModelError for a file that is not one, is cut short, or cannot be read.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self._handle = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
        try:
            self._layout()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.close()
            raise ModelError(f"{file}: not a whole safetensors file: {error}") from error

    def _layout(self) -> None:
        size = os.fstat(self._handle).st_size
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"{size} bytes do not hold its header")
        header = json.loads(os.pread(self._handle, length, 8))
        header.pop("__metadata__", None)
        self.shapes = {key: tuple(about["shape"]) for key, about in header.items()}
        self.dtypes = {key: DTYPES[about["dtype"]] for key, about in header.items()}
        self._starts = {}
        for key, about in header.items():
            first, last = about["data_offsets"]
            if last - first != math.prod(self.shapes[key]) * self.dtypes[key].itemsize or 8 + length + last > size:
                raise ValueError(f"{key} lies outside of its {size} bytes")
            self._starts[key] = 8 + length + first

    def read(self, key: str, start: int, end: int) -> Tensor:
        """Elements [start, end) of a tensor, flat, in the file's dtype, in host memory."""
        out = torch.empty(end - start, dtype=self.dtypes[key])
        view, offset = _bytes(out), self._starts[key] + start * out.element_size()
        while view:
            try:
                count = os.preadv(self._handle, [view], offset)
            except OSError as error:
                raise ModelError(f"{self.file}: {key} cannot be read: {error.strerror}") from error
            if count == 0:
                raise ModelError(f"{self.file}: ends within {key}")
            view, offset = view[count:], offset + count
        return out

    def close(self) -> None:
        os.close(self._handle)


def write_tensors(file: Path, tensors: dict[str, Tensor], note: dict[str, str] | None = None) -> tuple[str, int]:
    """Writes host tensors as a safetensors file, and waits until they are on the disk.

    note: more for its metadata. Returns the file's sha256 (hexadecimal) and its size in bytes.
    """
    header, offset = {"__metadata__": {"format": "pt", **(note or {})}}, 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants aligned data
    digest = hashlib.sha256()
    with file.open("wb") as handle:

        def put(block: bytes | memoryview) -> None:
            handle.write(block)
            digest.update(block)

        put(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            view = _bytes(tensor.contiguous())
            for first in range(0, len(view), BLOCK):
                put(view[first : first + BLOCK])
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest(), 8 + len(text) + offset
