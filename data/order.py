"""The order of samples: a pure function of (number of samples, seed, epoch), the same for every number of ranks."""

import numpy as np


def epoch_permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in their order, int64 [samples]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(samples)


class Order:
    """Rows by global position: position p is the (p mod n)-th sample of epoch p // n."""

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed
        self._epoch, self._rows = -1, np.empty(0, np.int64)

    def row(self, position: int) -> int:
        epoch, place = divmod(position, self.samples)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, epoch_permutation(self.samples, self.seed, epoch)
        return int(self._rows[place])


def positions(step: int, part: int, rank: int, world: int, micro_batch: int, accumulation: int) -> range:
    """Global positions of one rank's micro-batch: step `step`, micro-step `part` of `accumulation`.

    A step takes micro_batch * world * accumulation consecutive positions, so that any split of the same global batch
    over ranks and micro-steps takes the same samples.
    """
    first = (step * accumulation + part) * world * micro_batch + rank * micro_batch
    return range(first, first + micro_batch)
