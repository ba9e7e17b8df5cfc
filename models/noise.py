"""Random draws that belong to a sample, not to a process.

Every draw is a function of (seed, stream, step, index of the sample in the global batch). So two ranks with a batch of 4
each see the noise that one process with a batch of 8 sees, a resumed run sees the noise that it would have seen, and
there is no generator state to save.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class SampleNoise:
    """Per-sample noise on one device. `at(step, index)` gives the draws of one micro-batch."""

    def __init__(self, seed: int | str, device: torch.device | str = "cpu"):
        self.seed = seed
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device)

    def at(self, step: int, index: list[int]) -> "Draws":
        """The draws of the samples `index` (places in the global batch) at a step."""
        return Draws(self, step, index)

    def key(self, *parts: str | int) -> int:
        """63 bits that belong to the parts and the seed."""
        key = "/".join(str(part) for part in (self.seed, *parts)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1

    def generator(self, stream: str, step: int, index: int) -> torch.Generator:
        """The generator of one draw; valid until the next call."""
        return self._generator.manual_seed(self.key(stream, step, index))


@dataclass(frozen=True)
class Draws:
    """The noise of some samples at one step. Streams are names such as "z" or "t"; equal names give equal draws."""

    noise: SampleNoise
    step: int
    index: list[int]

    def rows(self, rows: slice) -> "Draws":
        """The draws of some of the samples."""
        return replace(self, index=self.index[rows])

    def integer(self, stream: str, count: int) -> int:
        """A uniform draw of 0 .. count - 1 that belongs to the step: the same on every rank, and known on the host."""
        return self.noise.key(stream, self.step) % count

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise [samples, *shape], float32."""
        out = torch.empty(len(self.index), *shape, device=self.noise.device)
        for row, i in zip(out, self.index, strict=True):
            row.normal_(generator=self.noise.generator(stream, self.step, i))
        return out

    def uniform(self, stream: str) -> Tensor:
        """Uniform draws in [0, 1) [samples], float32."""
        out = torch.empty(len(self.index), device=self.noise.device)
        for row, i in zip(out.split(1), self.index, strict=True):
            row.uniform_(generator=self.noise.generator(stream, self.step, i))
        return out
