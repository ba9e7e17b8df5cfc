"""Random draws that belong to a sample, not to a process.

Every draw is a function of (seed, stream, step, index of the sample in the global batch). Two ranks with a batch of 4
therefore see the noise that one process with a batch of 8 sees, a resumed run sees the noise that it would have seen,
and there is no generator state to save.
"""

import hashlib

import torch
from torch import Tensor


class SampleNoise:
    """Per-sample noise on one device. Streams are names such as "z" or "t"; equal arguments give equal draws."""

    def __init__(self, seed: int | str, device: torch.device | str = "cpu"):
        self.seed = seed
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device)

    def _key(self, *parts: str | int) -> int:
        """63 bits that belong to the parts and the seed."""
        key = "/".join(str(part) for part in (self.seed, *parts)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1

    def _reseed(self, stream: str, step: int, index: int) -> torch.Generator:
        return self._generator.manual_seed(self._key(stream, step, index))

    def integer(self, stream: str, step: int, count: int) -> int:
        """A uniform draw of 0 .. count - 1 that belongs to a step: the same on every rank, and known on the host."""
        return self._key(stream, step) % count

    def normal(self, stream: str, step: int, index: list[int], shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of shape [len(index), *shape], float32."""
        out = torch.empty(len(index), *shape, device=self.device)
        for row, i in zip(out, index, strict=True):
            row.normal_(generator=self._reseed(stream, step, i))
        return out

    def uniform(self, stream: str, step: int, index: list[int]) -> Tensor:
        """Uniform draws in [0, 1) of shape [len(index)], float32."""
        out = torch.empty(len(index), device=self.device)
        for row, i in zip(out.split(1), index, strict=True):
            row.uniform_(generator=self._reseed(stream, step, i))
        return out
