"""An index of each shard: where every member lies. With it any sample is one read away, in any order.

The index of `x.tar` is `x.tar.index.npz` beside it. Reading a tar's headers is strict: webdataset and tarfile stop
silently at a corrupt header, and a shard then loses its tail without a word.
"""

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError

BLOCK = 512
VERSION = 1


@dataclass(frozen=True)
class ShardIndex:
    """keys: sample names, [N]; extensions: E names; offset, size: int64 [N, E], bytes in the tar, -1 where missing."""

    tar: Path
    keys: np.ndarray
    extensions: list[str]
    offset: np.ndarray
    size: np.ndarray

    def column(self, extension: str) -> int | None:
        return self.extensions.index(extension) if extension in self.extensions else None


def index_file(tar: Path) -> Path:
    return tar.with_name(tar.name + ".index.npz")


def _members(tar: Path) -> list[tuple[str, int, int]]:
    """(name, offset of the bytes, size) of every file in a tar. Raises DataError where it is cut off or corrupt."""
    total = tar.stat().st_size
    members, last, position = [], "none", 0
    with tarfile.open(tar, "r:") as archive, tar.open("rb") as raw:
        while True:
            try:
                member = archive.next()
            except tarfile.TarError as error:
                raise DataError(
                    f"shard {tar}: corrupt header at byte {position} (last whole member: {last}): {error}"
                ) from error
            if member is None:
                break
            end = member.offset_data + member.size
            if end > total:
                raise DataError(
                    f"shard {tar}: truncated: member {member.name} at byte {member.offset} should end at byte {end}, the "
                    f"file at {total} (last whole member: {last}): copy or build it again"
                )
            position, last = member.offset_data + -(-member.size // BLOCK) * BLOCK, member.name
            if member.isfile():
                members.append((member.name, member.offset_data, member.size))
        # A tar ends with zero blocks. tarfile also stops where a header does not parse, which must not pass for the end.
        raw.seek(position)
        rest = raw.read(BLOCK)
    if len(rest) < BLOCK:
        raise DataError(
            f"shard {tar}: truncated at byte {total}, behind {last}: its end mark is missing: copy or build it again"
        )
    if any(rest):
        raise DataError(f"shard {tar}: corrupt header at byte {position} (last whole member: {last}): build it again")
    return members


def build_index(tar: Path) -> ShardIndex:
    """Reads a tar's headers. Raises DataError if the tar cannot be read to its end or holds a member twice."""
    try:
        members = _members(tar)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"shard {tar}: cannot be read as a tar: {error}") from error
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in members:
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")  # webdataset's convention: the key ends at the first dot
        sample = rows.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if extension in sample:
            raise DataError(f"shard {tar}: member {name} is there twice: give every sample its own key")
        sample[extension.lower()] = offset, size
    extensions = sorted({e for sample in rows.values() for e in sample})
    offset = np.full((len(rows), len(extensions)), -1, dtype=np.int64)
    size = offset.copy()
    for i, sample in enumerate(rows.values()):
        for extension, (at, length) in sample.items():
            offset[i, extensions.index(extension)], size[i, extensions.index(extension)] = at, length
    return ShardIndex(tar, np.array(list(rows), dtype=np.str_), extensions, offset, size)


def _stamp(tar: Path) -> np.ndarray:
    stat = tar.stat()
    return np.array([VERSION, stat.st_size, stat.st_mtime_ns], dtype=np.int64)


def save_index(index: ShardIndex) -> bool:
    """Writes the index beside its tar, atomically; False if the folder cannot be written (a read-only data set)."""
    file = index_file(index.tar)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            np.savez(
                handle, keys=index.keys, extensions=np.array(index.extensions, dtype=np.str_),
                offset=index.offset, size=index.size, stamp=_stamp(index.tar),
            )  # fmt: skip
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def load_index(tar: Path) -> ShardIndex:
    """The saved index of a tar; built (and saved if possible) when there is none or the tar has changed since."""
    file = index_file(tar)
    if file.is_file():
        try:
            with np.load(file) as saved:
                if np.array_equal(saved["stamp"], _stamp(tar)):
                    extensions = [str(e) for e in saved["extensions"]]
                    return ShardIndex(tar, saved["keys"], extensions, saved["offset"], saved["size"])
        except (OSError, ValueError, KeyError, EOFError):
            pass  # half an index of a killed writer on a file system without atomic renames: build it again
    index = build_index(tar)
    save_index(index)
    return index
