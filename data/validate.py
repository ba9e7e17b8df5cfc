"""Validates a set of shards: counts usable and rejected samples, and finds broken shards."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.errors import DataError
from data.settings import DataSettings
from data.shard_dataset import SampleError, ShardDataset
from data.shard_index import load_index

DEFAULTS = DataSettings()


def validate(paths: Sequence[Path], decode: bool = False, settings: DataSettings = DEFAULTS) -> dict:
    """Reads every caption and, with `decode`, every image, as training with these settings would. A broken shard is
    reported; the others are still validated.

    Returns {"shards": count, "samples": usable ones, "rejects": {reason: count}, "bytes": total size,
    "caption_mean_length": in characters, "broken": {shard: message}, "empty": [shards without samples]}.
    """
    rejects: Counter[str] = Counter()
    broken: dict[str, str] = {}
    empty: list[str] = []
    samples = length = size = 0
    for path in paths:
        size += path.stat().st_size if path.exists() else 0
        lengths: list[int] = []
        shard_rejects: Counter[str] = Counter()
        try:
            if not len(load_index(path)):
                empty.append(str(path))
                continue
            # Requests images and captions so that missing ones are counted; image bytes are read only to decode them.
            dataset = ShardDataset([path], settings.resolution, ("image", "caption", "meta"), 0, **settings.keys)
            shard_rejects += dataset.rejected
            for row in range(len(dataset)):
                try:
                    lengths.append(len((dataset.read(row) if decode else dataset.read_text(row))["caption"]))
                except SampleError as reason:
                    shard_rejects[str(reason)] += 1
            dataset.close()
        except DataError as error:
            broken[str(path)] = str(error)
            continue
        samples, length = samples + len(lengths), length + sum(lengths)
        rejects += shard_rejects
    return {
        "shards": len(paths),
        "samples": samples,
        "rejects": dict(rejects),
        "bytes": size,
        "caption_mean_length": length / samples if samples else 0.0,
        "broken": broken,
        "empty": empty,
    }
