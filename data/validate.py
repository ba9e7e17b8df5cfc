"""What is in a set of shards, and what is wrong with it."""

from collections import Counter
from pathlib import Path

from data.config import DataSettings
from data.reader import Reject, ShardDataset


def validate(shards: list[Path], settings: DataSettings, images: bool, decode: bool) -> dict:
    """Counts usable samples and rejects by reason; with `decode`, reads and decodes every sample.

    Returns {"shards", "samples", "rejected": {reason: count}, "bytes"}. Raises DataError for a broken shard.
    """
    dataset = ShardDataset(shards, settings, seed=0, images=images)
    rejected = Counter(dataset.rejected)
    good = len(dataset)
    if decode:
        for row in range(len(dataset)):
            try:
                dataset.sample(row)
            except Reject as reason:
                rejected[str(reason)] += 1
                good -= 1
    size = sum(path.stat().st_size for path in shards)
    return {"shards": len(shards), "samples": good, "rejected": dict(rejected), "bytes": size}
