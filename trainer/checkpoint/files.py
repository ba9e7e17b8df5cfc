"""Durable small files, file sizes and free space. No torch: `disback status` reads checkpoints on login nodes."""

import errno
import os
import shutil
from pathlib import Path

MARGIN = 1.05  # file systems allocate whole blocks


def write_text(text: str, file: Path, durable: bool = True) -> None:
    """Replaces a small file atomically. durable: wait until it and its folder's entry are on the disk."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w") as handle:
        handle.write(text)
        if durable:
            handle.flush()
            os.fsync(handle.fileno())
    os.replace(temporary, file)
    if durable:
        sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries (a rename) are on the disk, where the file system supports that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below a folder, by relative path."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the folder's file system."""
    return shutil.disk_usage(folder).free
