"""The order of samples in aspect-ratio buckets: a pure function of (rows of each bucket, seed, global batch).

Every step takes its global batch from one bucket, so that all ranks have the same shape. Bucket b with n_b samples has an
endless sequence of positions, shuffled anew every n_b of them; its k-th batch of B samples takes positions k B .. k B + B - 1.
In epoch e, N samples long, bucket b gets floor((e + 1) n_b / B) - floor(e n_b / B) batches, in an order that is shuffled with
the epoch. So sum_b floor(e n_b / B) steps precede epoch e, and any step is found without state.
"""

from collections.abc import Iterator

import numpy as np

# Between the random streams of one seed; the plain order of sampling_order.py has two numbers as its key.
STEPS, ROWS = 1, 2


class BucketOrder:
    """Maps global positions to rows: position p is number p % B of step p // B. It keeps 8 bytes per sample in memory."""

    def __init__(self, buckets: np.ndarray, seed: int, batch: int):
        """buckets: the bucket of each row, [N]. batch: samples per step, B."""
        self.seed, self.batch = seed, batch
        whole = np.int32 if len(buckets) < 2**31 else np.int64
        self.rows = [np.flatnonzero(buckets == b).astype(whole) for b in range(int(buckets.max(initial=-1)) + 1)]
        self.counts = [len(rows) for rows in self.rows]
        self._epoch, self._steps, self._places = -1, np.empty(0, np.int16), []
        self._shuffled: dict[int, tuple[int, np.ndarray]] = {}  # of each bucket, the rows of one of its epochs

    def steps_before(self, epoch: int) -> int:
        """The number of steps before an epoch of all samples."""
        return sum(epoch * count // self.batch for count in self.counts)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step is in."""
        low, high = 0, 1
        while self.steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) <= step else (low, middle)
        return low

    def batch_of(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and which of the bucket's batches it takes."""
        epoch = self.epoch_of(step)
        if epoch != self._epoch:
            self._plan(epoch)
        place = step - self.steps_before(epoch)
        bucket = int(self._steps[place])
        earlier = int(self._places[bucket].searchsorted(np.int32(place)))  # of the same type: else all are converted
        return bucket, epoch * self.counts[bucket] // self.batch + earlier

    def _plan(self, epoch: int) -> None:
        counts = [(epoch + 1) * n // self.batch - epoch * n // self.batch for n in self.counts]
        steps = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        np.random.Generator(np.random.PCG64([self.seed, STEPS, epoch])).shuffle(steps)
        self._epoch, self._steps = epoch, steps
        self._places = [np.flatnonzero(steps == b).astype(np.int32) for b in range(len(counts))]

    def row(self, bucket: int, number: int) -> int:
        """The dataset row at a position of a bucket's own sequence."""
        epoch, place = divmod(number, self.counts[bucket])
        if self._shuffled.get(bucket, (-1, None))[0] != epoch:
            self._shuffled.pop(bucket, None)  # before there is another one
            rows = self.rows[bucket].copy()
            np.random.Generator(np.random.PCG64([self.seed, ROWS, bucket, epoch])).shuffle(rows)
            self._shuffled[bucket] = epoch, rows
        return int(self._shuffled[bucket][1][place])

    def candidates(self, position: int) -> Iterator[int]:
        """The row at a global position, then those that replace it if it is broken: the next ones of its bucket's epoch."""
        step, place = divmod(position, self.batch)
        bucket, number = self.batch_of(step)
        return self.candidates_in(bucket, number * self.batch + place)

    def candidates_in(self, bucket: int, number: int) -> Iterator[int]:
        """The same of a position of a bucket's own sequence."""
        count = self.counts[bucket]
        start = number - number % count
        return (self.row(bucket, start + (number + miss) % count) for miss in range(count))
