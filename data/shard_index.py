"""An index of each shard: where every member lies. With it any sample is one read away, in any order.

The index of `x.tar` is `x.tar.index.npz` beside it.
"""

import os
import re
import uuid
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.tar_members import members

VERSION = 1
# webdataset's convention: the key ends at the first dot of the file name; names without a key or a dot are no samples
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


@dataclass(frozen=True)
class ShardIndex:
    """keys: UTF-8 bytes [N] (a quarter of numpy's str); extensions: E names, lower case; offset, size: int64 [N, E],
    bytes in the tar, -1 where a sample has no such member; stamp: int64 [version, tar's bytes, tar's mtime in ns]."""

    tar: Path
    keys: np.ndarray
    extensions: list[str]
    offset: np.ndarray
    size: np.ndarray
    stamp: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def member(self, extensions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size, int64 [N] each, of each sample's first non-empty member of these extensions; -1 if none."""
        offset, size = np.full(len(self), -1, np.int64), np.full(len(self), -1, np.int64)
        for extension in reversed(extensions):
            if extension.lower() in self.extensions:
                column = self.extensions.index(extension.lower())
                there = self.size[:, column] > 0
                offset[there], size[there] = self.offset[there, column], self.size[there, column]
        return offset, size


def index_file(tar: Path) -> Path:
    """Where a tar's index is kept."""
    return tar.with_name(tar.name + ".index.npz")


def build_index(tar: Path) -> ShardIndex:
    """Walks a tar's headers. Raises DataError if the tar is missing, cut off, corrupt, or holds a member twice."""
    stamp = _stamp(tar)  # before the walk: a tar replaced meanwhile then has a stale index, not a wrong one
    places: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in members(tar):
        if not (match := NAME.fullmatch(name)):
            continue
        sample, extension = places.setdefault(match[1], {}), match[2].lower()
        if extension in sample:
            raise DataError(
                f"shard {tar}: key {match[1]} has two .{extension} members, the second at byte {offset}: "
                "give every sample its own key and build the shard again"
            )
        sample[extension] = offset, size
    extensions = sorted({extension for sample in places.values() for extension in sample})
    offsets = np.full((len(places), len(extensions)), -1, dtype=np.int64)
    sizes = offsets.copy()
    for column, extension in enumerate(extensions):
        for row, sample in enumerate(places.values()):
            offsets[row, column], sizes[row, column] = sample.get(extension, (-1, -1))
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in places], dtype=np.bytes_)
    return ShardIndex(tar, keys, extensions, offsets, sizes, stamp)


def save_index(index: ShardIndex) -> bool:
    """Writes an index beside its tar, atomically; False if that folder cannot be written (a read-only data set)."""
    file = index_file(index.tar)
    # Not the process id: ranks on several nodes may write into one shared folder.
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    arrays = {"keys": index.keys, "extensions": np.array(index.extensions, np.str_), "stamp": index.stamp}
    try:
        with temporary.open("wb") as handle:
            np.savez(handle, offset=index.offset, size=index.size, **arrays)
        os.replace(temporary, file)
    except OSError:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the folder refuses that too
        return False
    return True


def load_index(tar: Path) -> ShardIndex:
    """A tar's saved index; built, and saved where possible, if there is none or the tar has changed since.

    Raises DataError as build_index does.
    """
    stamp = _stamp(tar)
    try:
        with np.load(index_file(tar)) as saved:
            if np.array_equal(saved["stamp"], stamp):
                extensions = saved["extensions"].tolist()
                return ShardIndex(tar, saved["keys"], extensions, saved["offset"], saved["size"], stamp)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # missing, or half a file from a copy that was cut off: it is only a cache
    index = build_index(tar)
    save_index(index)
    return index


def usable_rows(
    index: ShardIndex, caption_key: str | None, image_keys: list[str] | None, cache_key: str | None = None
) -> tuple[np.ndarray, Counter]:
    """Rows int64 [M] of the samples that have what is wanted (None: not wanted), and the others counted by reason.

    Raises DataError if no sample is left: a shard without captions is a mistake in building it, not noise.
    """
    rejects: Counter[str] = Counter()
    usable = np.ones(len(index), dtype=bool)
    caption_keys, cache_keys = ([key] if key else None for key in (caption_key, cache_key))
    for what, extensions in (("caption", caption_keys), ("image", image_keys), ("encoded tensors", cache_keys)):
        if extensions is not None:
            there = index.member(extensions)[1] > 0
            rejects[f"no {what} (.{', .'.join(extensions)})"] += int((usable & ~there).sum())
            usable &= there
    rejects = +rejects
    if not usable.any():
        reasons = "; ".join(f"{count} have {reason}" for reason, count in rejects.items()) or "it holds no samples"
        known = ", ".join(f".{extension}" for extension in index.extensions) or "nothing"
        raise DataError(
            f"shard {index.tar}: none of its {len(index)} samples can be used: {reasons}; its members are {known}: "
            "set data.caption_key and data.image_keys to match, or build the shard again with `disback shards`"
        )
    return np.flatnonzero(usable), rejects


def _stamp(tar: Path) -> np.ndarray:
    try:
        stat = tar.stat()
    except OSError as error:
        raise DataError(f"shard {tar}: {error.strerror}: build it with `disback shards` or correct the path") from error
    return np.array([VERSION, stat.st_size, stat.st_mtime_ns], dtype=np.int64)
