"""Several sources mixed by weight: which one a position is read from."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from data.errors import DataError

PERIOD = 1000  # positions after which the pattern repeats: weights count in thousandths


class Mixture:
    """The source of each position, and the position within that source: a pure function of (weights, seed, position)."""

    def __init__(self, weights: Sequence[float], seed: int):
        share = np.array(weights) / sum(weights) * PERIOD
        counts = np.maximum(np.floor(share).astype(np.int64), 1)
        for source in np.argsort(counts - share, kind="stable")[: max(PERIOD - counts.sum(), 0)]:
            counts[source] += 1
        pattern = np.repeat(np.arange(len(counts)), counts)
        self._pattern = np.random.Generator(np.random.PCG64([seed, PERIOD])).permutation(pattern)
        self._counts = counts
        self._before = np.empty(len(pattern), np.int64)  # positions of the same source earlier in the pattern
        for source in range(len(counts)):
            places = np.flatnonzero(self._pattern == source)
            self._before[places] = np.arange(len(places))

    def locate(self, position: int) -> tuple[int, int]:
        """(source, position within it)."""
        round_, place = divmod(position, len(self._pattern))
        source = int(self._pattern[place])
        return source, int(round_ * self._counts[source] + self._before[place])


class MixedDataset(Dataset):
    """Datasets by position, mixed by weight. Each goes through epochs of its own."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], seed: int):
        self.datasets, self._mixture = list(datasets), Mixture(weights, seed)
        self.encoding = self.datasets[0].encoding
        if any(dataset.encoding != self.encoding for dataset in self.datasets):
            raise DataError("the sources of data.train are encoded differently: name shards of one kind only")
        self.shapes, self.counts = self.datasets[0].shapes, [len(self)]
        self.rejected: Counter[str] = Counter()
        for dataset in self.datasets:
            self.rejected += dataset.rejected

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def __getitem__(self, position: int) -> dict:
        source, place = self._mixture.locate(position)
        return self.datasets[source][place] | {"position": position}

    main_bucket = 0

    def example(self, number: int, bucket: int | None = None) -> dict:
        """dataset[number]; there is one bucket."""
        return self[number]

    def close(self) -> None:
        for dataset in self.datasets:
            dataset.close()
