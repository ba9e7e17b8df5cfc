"""What is in a set of shards, and what is wrong with it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.errors import DataError
from data.reader import Reject, ShardDataset
from data.settings import DataSettings

DEFAULTS = DataSettings()


def validate(
    paths: Sequence[Path],
    decode: bool = False,
    image_keys: list[str] = DEFAULTS.image_keys,
    caption_key: str = DEFAULTS.caption_key,
) -> dict:
    """Reads every caption, and with `decode` every image. A broken shard is reported and does not end the check.

    Returns {"shards": int, "samples": usable ones, "rejects": {reason: count}, "bytes": of all shards,
    "caption_mean_length": characters, "broken": {shard: message}}.
    """
    rejects: Counter[str] = Counter()
    broken: dict[str, str] = {}
    samples = length = size = 0
    for path in paths:
        size += path.stat().st_size if path.exists() else 0
        good: list[int] = []
        found: Counter[str] = Counter()
        try:
            # Both are wanted, so that the index counts what is missing; images are read only to be decoded.
            dataset = ShardDataset([path], 8, ("image", "caption", "meta"), 0, image_keys, caption_key)
            found += dataset.rejected
            for row in range(len(dataset)):
                try:
                    good.append(len((dataset.read(row) if decode else dataset.read_text(row))["caption"]))
                except Reject as reason:
                    found[str(reason)] += 1
            dataset.close()
        except DataError as error:
            broken[str(path)] = str(error)
            continue
        samples, length = samples + len(good), length + sum(good)
        rejects += found
    return {
        "shards": len(paths),
        "samples": samples,
        "rejects": dict(rejects),
        "bytes": size,
        "caption_mean_length": length / samples if samples else 0.0,
        "broken": broken,
    }
