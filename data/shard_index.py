"""Shard indexes: the offset and size of every member, so that any sample can be read at random with one read.

The index of `x.tar` is stored next to it as `x.tar.index.npz`.
"""

import json
import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.npz_files import write_npz
from data.tar_members import members

VERSION = 1
# webdataset's convention: the key ends at the first dot of the file name; files without a key or a dot are not samples
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
EMPTY = "empty shard"
DOTTED = "dot in the name (WebDataset ends a sample's key at the first one): rename, or rebuild with --images"
SHOWN = 12  # file extensions in a message


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard.

    keys: UTF-8 bytes [N] (numpy's str takes four times as much). extensions: E names in lower case. offset, size: int64
    [N, E], in bytes; -1 where a sample has no such member. stamp: int64 [index version, tar size in bytes, tar mtime in
    ns].
    """

    tar: Path
    keys: np.ndarray
    extensions: list[str]
    offset: np.ndarray
    size: np.ndarray
    stamp: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def locate(self, extensions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size, int64 [N] each, of each sample's first non-empty member with one of these extensions; -1 if
        it has none."""
        offset, size = np.full(len(self), -1, np.int64), np.full(len(self), -1, np.int64)
        for extension in reversed(extensions):
            if extension.lower() in self.extensions:
                column = self.extensions.index(extension.lower())
                present = self.size[:, column] > 0
                offset[present], size[present] = self.offset[present, column], self.size[present, column]
        return offset, size


def index_file(tar: Path) -> Path:
    """The file with a tar's index."""
    return tar.with_name(tar.name + ".index.npz")


def build_index(tar: Path) -> ShardIndex:
    """Indexes a tar from its headers. Raises DataError if it is missing, truncated, corrupt, or repeats a member."""
    stamp = _stamp(tar)  # before the headers are read: a tar replaced meanwhile gets a stale index, not a wrong one
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in members(tar):
        if not (match := NAME.fullmatch(name)):
            continue
        sample, extension = samples.setdefault(match[1], {}), match[2].lower()
        if extension in sample:
            raise DataError(
                f"shard {tar}: key {match[1]} has two .{extension} members, the second at byte {offset}: "
                "give every sample a unique key and build the shard again"
            )
        sample[extension] = offset, size
    extensions = sorted({extension for sample in samples.values() for extension in sample})
    offsets = np.full((len(samples), len(extensions)), -1, dtype=np.int64)
    sizes = offsets.copy()
    for column, extension in enumerate(extensions):
        for row, sample in enumerate(samples.values()):
            offsets[row, column], sizes[row, column] = sample.get(extension, (-1, -1))
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in samples], dtype=np.bytes_)
    return ShardIndex(tar, keys, extensions, offsets, sizes, stamp)


def save_index(index: ShardIndex) -> bool:
    """Writes an index next to its tar, atomically; False if the folder is not writable (a read-only data set)."""
    file = index_file(index.tar)
    arrays = {"keys": index.keys, "extensions": np.array(index.extensions, np.str_), "stamp": index.stamp}
    return write_npz(file, arrays | {"offset": index.offset, "size": index.size})


def load_index(tar: Path) -> ShardIndex:
    """A tar's saved index. If it is missing or older than the tar, it is built and, where possible, saved.

    Raises DataError as build_index does.
    """
    stamp = _stamp(tar)
    try:
        with np.load(index_file(tar)) as saved:
            if np.array_equal(saved["stamp"], stamp):
                extensions = saved["extensions"].tolist()
                return ShardIndex(tar, saved["keys"], extensions, saved["offset"], saved["size"], stamp)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # missing, or truncated by an interrupted copy: build it again
    index = build_index(tar)
    save_index(index)
    return index


def usable_rows(
    index: ShardIndex, required: dict[str, list[str]], sample: tuple[list[str], list[str]] | None = None
) -> tuple[np.ndarray, Counter]:
    """Rows int64 [M] of the samples with every required member, and counts of the others by reason. An empty shard is
    counted too, as one.

    required: extensions by what they are, for example {"caption": ["txt"]}; one of them must be present. sample: the
    extensions of images and of captions, by which cat.v2.png and cat.v2.txt are found to be a sample of their own, which
    the key "cat" hides. Raises DataError if no sample is left: a whole shard without captions was built wrongly.
    """
    if not len(index):
        return np.empty(0, np.int64), Counter([EMPTY])
    hidden = _hidden_samples(index, *sample) if sample else np.zeros(len(index), np.int64)
    only_hidden = hidden > 0  # rows that are no sample themselves
    for extensions in sample or ():
        only_hidden &= index.locate(extensions)[1] <= 0
    rejects: Counter[str] = Counter({DOTTED: int(hidden.sum())})
    usable = np.ones(len(index), dtype=bool)
    for what, extensions in required.items():
        present = index.locate(extensions)[1] > 0
        rejects[f"no {what} (.{', .'.join(extensions)})"] += int((usable & ~present & ~only_hidden).sum())
        usable &= present
    rejects = +rejects
    if not usable.any():
        reasons = "; ".join(f"{count} have {reason}" for reason, count in rejects.items())
        known = ", ".join(f".{extension}" for extension in index.extensions[:SHOWN])
        more = ", ..." if len(index.extensions) > SHOWN else ""
        raise DataError(
            f"shard {index.tar}: none of its {len(index) + int((hidden - only_hidden).sum())} samples is usable: {reasons}; file extensions in it: "
            f"{known}{more}{_fields(index)}: set data.caption_key or data.caption_field and data.image_keys to match "
            "(--caption-key, --caption-field, --image-keys), or build the shard again with `disback shards`"
        )
    return np.flatnonzero(usable), rejects


def _hidden_samples(index: ShardIndex, image: list[str], caption: list[str]) -> np.ndarray:
    """How many samples of their own each row hides behind dots in their names: int64 [N]."""
    count = np.zeros(len(index), np.int64)
    for middle in {extension.rpartition(".")[0] for extension in index.extensions} - {""}:
        both = [index.locate([f"{middle}.{end}" for end in ends])[1] > 0 for ends in (image, caption)]
        count += both[0] & both[1]
    return count


def _fields(index: ShardIndex) -> str:
    """The fields of a shard's first .json, for a message; empty if it has none."""
    try:
        names = [name for name, value in first_json(index).items() if isinstance(value, str)]
    except (OSError, ValueError, RecursionError, AttributeError):
        return ""
    return f" (with the text fields {', '.join(names[:SHOWN])} in the .json)" if names else ""


def first_json(index: ShardIndex) -> dict:
    """The .json of a shard's first sample; empty if it has none. Raises OSError and ValueError, and returns what it finds
    if that is no object."""
    offsets, sizes = index.locate(["json"])
    with index.tar.open("rb") as tar:
        tar.seek(max(int(offsets[0]), 0))
        return json.loads(tar.read(max(int(sizes[0]), 0)) or b"{}")


def _stamp(tar: Path) -> np.ndarray:
    try:
        stat = tar.stat()
    except OSError as error:
        raise DataError(f"shard {tar}: {error.strerror}: build it with `disback shards`, or fix the path") from error
    return np.array([VERSION, stat.st_size, stat.st_mtime_ns], dtype=np.int64)
