"""A strict reader of tar headers.

tarfile and webdataset both take an unreadable header for the end of the archive, and so drop the rest of a shard
silently. Here a tar is complete only if every member lies inside it and nothing but zeros follows the last one.
"""

import tarfile
from pathlib import Path

from data.errors import DataError

BLOCK = 512
MAX_HEADER = 1 << 20  # bytes of a long name or of PAX records, which tarfile reads at once
LONG_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
ADVICE = "copy it again from its source or rebuild it with `disback shards`"


class BoundedHeader(tarfile.TarInfo):
    """A tar header that claims no name of gigabytes."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "BoundedHeader":
        header = super().frombuf(buf, encoding, errors)
        if header.type in LONG_HEADERS and header.size > MAX_HEADER:
            raise tarfile.ReadError(f"a name of {header.size} bytes")
        return header


def members(tar: Path) -> list[tuple[str, int, int]]:
    """(name, data offset, size in bytes) of every file in a tar, in the tar's order.

    A file of no bytes has no members. Raises DataError if the tar is truncated, has a corrupt header, or has links or
    sparse files (no bytes to index).
    """
    found: list[tuple[str, int, int]] = []
    try:
        total = tar.stat().st_size
        if not total:
            return found
        with tarfile.open(tar, "r:", tarinfo=BoundedHeader) as archive:
            position = 0
            while (member := _next(archive, tar, position, found)) is not None:
                if max(member.offset_data + member.size, archive.offset) > total:
                    raise DataError(
                        f"shard {tar}: truncated at byte {total}, inside member {member.name}; {_last(found)}: {ADVICE}"
                    )
                position = archive.offset
                if member.islnk() or member.issym() or member.issparse():
                    raise DataError(
                        f"shard {tar}: member {member.name} is a link or a sparse file: pack plain files "
                        "(tar --hard-dereference --dereference)"
                    )
                if member.isfile():
                    found.append((member.name, member.offset_data, member.size))
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(f"shard {tar}: cannot be read as an uncompressed tar ({error}): {ADVICE}") from error
    _check_end(tar, position, total, found)
    return found


def _next(archive: tarfile.TarFile, tar: Path, position: int, found: list) -> tarfile.TarInfo | None:
    try:
        return archive.next()
    except (tarfile.TarError, ValueError) as error:  # ValueError: of absurd PAX records
        raise DataError(
            f"shard {tar}: corrupt header at byte {position} ({error}); {_last(found)}: {ADVICE}"
        ) from error


def _check_end(tar: Path, position: int, total: int, found: list) -> None:
    """Raises DataError unless the rest of the tar is its end mark (zeros), not a header that tarfile cannot parse."""
    if total - position < BLOCK:
        raise DataError(f"shard {tar}: truncated at byte {total}, without its end mark; {_last(found)}: {ADVICE}")
    with tar.open("rb") as raw:
        raw.seek(position)
        while chunk := raw.read(1 << 20):
            if any(chunk):
                raise DataError(f"shard {tar}: corrupt header at byte {position}; {_last(found)}: {ADVICE}")


def _last(found: list[tuple[str, int, int]]) -> str:
    return f"the last complete member is {found[-1][0]}" if found else "no member is complete"
