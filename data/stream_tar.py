"""Samples of a tar that is read once, from its start to its end.

As strict as `tar_members`, which webdataset's own reader is not: it takes a damaged header for the end, and completes the last
sample of a truncated tar from the next one. Here a sample is complete when another one or the end mark follows it.
"""

import io
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator

from data.shard_index import EMPTY, NAME
from data.tar_members import BoundedHeader

BUFFER = 1 << 17  # bytes read at once; tarfile takes 10 kB
DAMAGED = "truncated or damaged shard"
TRAILING = "shard with data after its end mark"
LINKS = "shard with links or sparse files"
REPEATED = "two members of one name"


class DamagedShard(Exception):
    """The rest of a shard cannot be used; the message is the reason under which it is counted."""


class _StrictHeader(BoundedHeader):
    """A tar header. tarfile would take a damaged or missing one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_StrictHeader":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise DamagedShard(DAMAGED) from error


class _Bytes:
    """A stream, and how many bytes were read of it."""

    def __init__(self, stream: io.IOBase):
        self._stream, self.count, self._ended = stream, 0, 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        self._ended += not data
        if self._ended > 9:  # tarfile would go on to the end of a member that claims petabytes
            raise DamagedShard(DAMAGED)
        return data


def tar_samples(
    stream: io.IOBase, skipped: Counter[str], keep: Collection[str] | None = None, largest: int = 1 << 30
) -> Iterator[dict[str, str | bytes]]:
    """The samples of a tar: {"__key__": key, extension: bytes, ...}, extensions in lower case, their members adjacent.

    skipped: counts what is left out. keep: the extensions to read (default: all). largest: a member of more bytes is not read,
    as if it were missing. Raises DamagedShard after the last
    complete sample, and what the stream raises.
    """
    source, sample, names = _Bytes(stream), {}, set()
    try:
        with tarfile.open(fileobj=source, mode="r|", bufsize=BUFFER, tarinfo=_StrictHeader) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # would grow for ever
                if member.islnk() or member.issym() or member.issparse():
                    raise DamagedShard(LINKS)
                if not member.isfile() or not (match := NAME.fullmatch(member.name)):
                    continue
                key, extension = match[1], match[2].lower()
                if sample and key != sample["__key__"]:
                    yield from _complete(sample, names, skipped)
                    sample, names = {}, set()
                sample["__key__"] = key
                if extension in names:
                    sample["__repeated__"] = True
                names.add(extension)
                if (keep is None or extension in keep) and member.size <= largest:
                    data = sample[extension] = archive.fileobj.read(member.size)  # faster than extractfile
                    if len(data) < member.size:
                        raise DamagedShard(DAMAGED)
            if sample:
                yield from _complete(sample, names, skipped)
                sample = {}
            while rest := archive.fileobj.read(1 << 16):
                if any(rest):
                    raise DamagedShard(TRAILING)
    except (DamagedShard, tarfile.TarError, EOFError, ValueError) as error:  # ValueError: of absurd PAX records
        if source.count == 0:
            skipped[EMPTY] += 1
        else:
            raise DamagedShard(str(error) if isinstance(error, DamagedShard) else DAMAGED) from error


def _complete(sample: dict, names: set[str], skipped: Counter[str]) -> Iterator[dict]:
    if "__repeated__" in sample:
        skipped[REPEATED] += 1
    else:
        sample["__names__"] = names
        yield sample


def hidden_samples(names: Collection[str], image: list[str], caption: list[str]) -> int:
    """How many samples of their own a sample hides behind dots in their names (see shard_index.DOTTED)."""
    if not (middles := {name.rpartition(".")[0] for name in names if "." in name}):
        return 0
    return sum(all(any(f"{middle}.{end}" in names for end in ends) for ends in (image, caption)) for middle in middles)
