"""The order of samples: a pure function of (number of samples, seed, epoch), the same for every world size."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The rows 0..n-1 in the order of an epoch, int64 [n]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


class SampleOrder:
    """Maps global positions to rows: position p is number p % n of epoch p // n."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epoch, self._rows = -1, np.empty(0, np.int64)

    def row(self, position: int) -> int:
        """The dataset row at a global position. Keeps one epoch's permutation in memory: 8 bytes per sample."""
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, epoch_permutation(self.n, self.seed, epoch)
        return int(self._rows[place])

    def candidates(self, position: int) -> Iterator[int]:
        """The row at a global position, then those that replace it if it is broken: the next ones of its epoch."""
        start = position - position % self.n
        return (self.row(start + (position + miss) % self.n) for miss in range(self.n))


@dataclass(frozen=True)
class BatchSplit:
    """How a step's global batch is split: `world` ranks, `accumulation` micro-batches of `micro_batch` samples each."""

    world: int
    micro_batch: int
    accumulation: int = 1

    @property
    def batch(self) -> int:
        return self.world * self.micro_batch * self.accumulation

    def positions(self, step: int, part: int, rank: int) -> range:
        """Global positions of a rank's micro-batch number `part` in a step.

        A step takes `batch` consecutive positions, so every split of one global batch takes the same samples.
        """
        first = ((step * self.accumulation + part) * self.world + rank) * self.micro_batch
        return range(first, first + self.micro_batch)

    def rows(self, part: int, rank: int) -> range:
        """Places of a rank's micro-batch within the global batch."""
        return self.positions(0, part, rank)
