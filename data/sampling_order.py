"""The order of samples: a pure function of (number of samples, seed, epoch), the same for every world size."""

from dataclasses import dataclass

import numpy as np


def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The rows 0..n-1 in the order of an epoch, int64 [n]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


class Order:
    """Rows by global position: position p is number p % n of epoch p // n."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epoch, self._rows = -1, np.empty(0, np.int64)

    def sample(self, position: int) -> int:
        """The dataset row at a global position. Only the current epoch's permutation is kept: 8 bytes a sample."""
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, epoch_permutation(self.n, self.seed, epoch)
        return int(self._rows[place])


def micro_batch_positions(step: int, part: int, rank: int, world: int, micro_batch: int, accumulation: int) -> range:
    """Global positions of one rank's micro-batch: micro-step `part` of `accumulation` in step `step`.

    A step takes micro_batch * world * accumulation consecutive positions, so every split of one global batch over
    ranks and micro-steps takes the same samples.
    """
    first = ((step * accumulation + part) * world + rank) * micro_batch
    return range(first, first + micro_batch)


@dataclass(frozen=True)
class Split:
    """How a step's global batch is cut: `world` ranks, `accumulation` micro-steps of `micro_batch` samples each."""

    world: int
    micro_batch: int
    accumulation: int

    @property
    def batch(self) -> int:
        return self.world * self.micro_batch * self.accumulation

    def rows(self, part: int, rank: int) -> range:
        """The places in the global batch of a rank's micro-batch."""
        return micro_batch_positions(0, part, rank, self.world, self.micro_batch, self.accumulation)
