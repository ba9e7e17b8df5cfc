"""What a data set holds of all its shards: the samples that are read, where their parts are, and their buckets."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.caption_source import CaptionSource
from data.encoded import EXTENSION, TENSORS, check_same_encoding, encoding_of
from data.errors import DataError
from data.selected_rows import facts_wanted, select
from data.selection import Selection
from data.settings import DataSettings
from data.shard_facts import Wanted
from data.shard_index import EMPTY, load_index, usable_rows

ENCODED_CAPTIONS = CaptionSource.of(DataSettings().caption_key, "")  # where encoded samples have their caption


@dataclass(frozen=True)
class Reading:
    """What is read of samples, and of which ones. want: see ShardDataset. captions: as configured, for plain images."""

    want: frozenset[str]
    image_keys: tuple[str, ...]
    captions: CaptionSource
    selection: Selection

    @property
    def facts(self) -> Wanted:
        """The facts that decide which samples are read."""
        return facts_wanted(self.selection, list(self.image_keys), self.captions)


@dataclass(frozen=True)
class Gathered:
    """The S shards that are not empty, and their N samples that are read, shard by shard.

    shards: int64 [S], each one's number in the list of paths. keys: of each shard's samples, UTF-8 bytes; one array per shard,
    since one for all would be as wide as the longest key. places: offset and size in bytes, int64 [N, 2], of each sample's
    "caption", "image", "tensors" and "meta", as far as they are read; -1 where it has none. buckets: int16 [N]. rejected:
    counts of the samples that are left out, by reason. encoding: how all shards are encoded; None for plain images.
    """

    shards: np.ndarray
    keys: list[np.ndarray]
    places: dict[str, np.ndarray]
    buckets: np.ndarray
    rejected: Counter[str]
    encoding: dict | None

    @classmethod
    def of(cls, paths: Sequence[Path], reading: Reading) -> "Gathered":
        """From the shards' indexes and facts, which are built where they are missing. Raises DataError as ShardDataset does, but
        not if the selection leaves no sample."""
        image_keys = list(reading.image_keys)
        shards, keys, buckets, columns = [], [], [], {}
        rejected: Counter[str] = Counter()
        first, encoding = None, None  # the first index with samples, and how its shard is encoded
        for number, index in enumerate(map(load_index, paths)):
            if not len(index):
                rejected[EMPTY] += 1
                continue
            if first is None:
                first, encoding = index, encoding_of(index)
                captions = ENCODED_CAPTIONS if encoding else reading.captions
                extensions = extensions_read(reading.want, image_keys, captions)
                columns = {what: [] for what in extensions}
                required = {what: extensions[what] for what in extensions if what != "meta"}
            check_same_encoding(first, encoding, index)
            rows, rejects = usable_rows(index, required, (image_keys, captions.extensions))
            rejected += rejects
            rows, bucket, rejects = select(reading.selection, index, rows, image_keys, reading.captions)
            rejected += rejects
            shards.append(number)
            keys.append(index.keys[rows])
            buckets.append(bucket)
            for what, column in columns.items():
                column.append(np.stack(index.locate(extensions[what]), axis=1)[rows])
        if first is None:
            what = (
                f"none of the {len(paths)} shards has a sample (the first is {paths[0]})"
                if paths
                else "no shards to read"
            )
            raise DataError(f"{what}: set data.train, or build shards with `disback shards`")
        places = {what: np.concatenate(column) for what, column in columns.items()}
        return cls(np.array(shards, np.int64), keys, places, np.concatenate(buckets), rejected, encoding)


def extensions_read(want: frozenset[str], image_keys: list[str], captions: CaptionSource) -> dict[str, list[str]]:
    """The file extensions of what is read: of "caption", "image", "tensors" and "meta"."""
    reads = set(want - TENSORS.keys())
    if want & TENSORS.keys():
        reads |= {"tensors", "meta"}
    if captions.fields and "caption" in reads:
        reads |= {"meta"}
    every = {"caption": captions.extensions, "image": image_keys, "tensors": [EXTENSION], "meta": ["json"]}
    return {what: every[what] for what in every if what in reads}
