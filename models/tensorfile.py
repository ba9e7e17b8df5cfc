"""Reads ranges of elements of safetensors files, and writes such files, with plain I/O.

The library memory-maps files: pages of a tensor are read at their first use, wherever that is, count as memory of the
process, and a disk error raises SIGBUS. Here a read is complete when it returns, goes straight into its destination,
and fails with an exception; a write computes the file's hash.
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
DTYPES |= {"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 1 << 26  # bytes per write and hash update
LARGEST_HEADER = 100_000_000  # the format's own limit


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class TensorFile:
    """An open safetensors file: its tensors' shapes and dtypes, and ranges of their elements.

    Raises ModelError for an invalid, truncated or unreadable file, and for tensors in a format such as fp8.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self._handle = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
        try:
            self._read_header()
        except ModelError:
            self.close()
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.close()
            raise ModelError(f"{file}: not a complete safetensors file: {error}") from error

    def _read_header(self) -> None:
        size = os.fstat(self._handle).st_size
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"its header does not fit into {size} bytes")
        header = json.loads(os.pread(self._handle, length, 8))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ModelError(
                    f"{self.file}: {key} is stored as {entry['dtype']}, no precision to train from or to compare with: use the "
                    "model's float16, bfloat16 or float32 files"
                )
        self.shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
        self.dtypes = {key: DTYPES[entry["dtype"]] for key, entry in header.items()}
        self._starts = {}
        for key, entry in header.items():
            first, last = entry["data_offsets"]
            if last - first != math.prod(self.shapes[key]) * self.dtypes[key].itemsize or 8 + length + last > size:
                raise ValueError(f"{key} lies outside its {size} bytes")
            self._starts[key] = 8 + length + first

    def read(self, key: str, start: int, end: int) -> Tensor:
        """Elements [start, end) of a flattened tensor, in the file's dtype, on the CPU."""
        out = torch.empty(end - start, dtype=self.dtypes[key])
        view, offset = _bytes(out), self._starts[key] + start * out.element_size()
        while view:
            try:
                count = os.preadv(self._handle, [view], offset)
            except OSError as error:
                raise ModelError(f"{self.file}: {key} cannot be read: {error.strerror}") from error
            if count == 0:
                raise ModelError(f"{self.file}: ends inside {key}")
            view, offset = view[count:], offset + count
        return out

    def close(self) -> None:
        os.close(self._handle)


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> tuple[str, int]:
    """Writes CPU tensors as a safetensors file and syncs it to disk.

    metadata: additional entries for its metadata. Returns the file's sha256 (hexadecimal) and its size in bytes.
    """
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires aligned data
    digest = hashlib.sha256()
    with file.open("wb") as handle:

        def write(block: bytes | memoryview) -> None:
            handle.write(block)
            digest.update(block)

        write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            view = _bytes(tensor.contiguous())
            for first in range(0, len(view), BLOCK):
                write(view[first : first + BLOCK])
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest(), 8 + len(text) + offset
