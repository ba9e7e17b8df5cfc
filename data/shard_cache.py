"""Copies of shards at URLs on a local disk, made before they are read."""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path

from data.errors import DataError
from data.remote_files import open_url

AT_ONCE = 8  # downloads of a process
REPORT_SECONDS = 15


def copy_shards(
    urls: Sequence[str], folder: Path, limit_gb: float, patience: float, say: Callable[[str], None]
) -> list[Path]:
    """The local copies of shards, in their order; those that are missing are downloaded. Every process of a node may call it:
    each shard is copied by one of them, and all wait until all are there.

    say: is told the progress. Raises DataError if a shard cannot be read, or the copies exceed limit_gb (0: no limit) or the
    disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copies = [folder / _name(url) for url in urls]
        used = sum(copy.stat().st_size for copy in copies if copy.exists())
        told = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            waiting = [
                pool.submit(_copy, url, copy, patience)
                for url, copy in zip(urls, copies, strict=True)
                if not copy.exists()
            ]
            done = len(urls) - len(waiting)
            try:
                for job in as_completed(waiting):
                    used, done = used + job.result(), done + 1
                    if limit_gb and used > limit_gb * 1e9:
                        raise DataError(
                            f"data.cache_gb={limit_gb:g} is too small for the shards of data.train ({used / 1e9:.2f} GB after "
                            f"{done} of {len(urls)}): raise it, or leave data.cache_dir empty to stream them"
                        )
                    if time.monotonic() - told > REPORT_SECONDS:
                        told = time.monotonic()
                        say(f"copying shards to {folder}: {done} of {len(urls)}, {used / 1e9:.1f} GB")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except OSError as error:
        raise DataError(f"data.cache_dir={folder}: {error}: check the address, the disk and its free space") from error
    return copies


def _name(url: str) -> str:
    """The file name of a copy: shards of one name at two addresses must not be mixed up."""
    last = re.sub(r"[^\w.-]", "_", url.rstrip("/").rpartition("/")[2])[-80:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{last.removesuffix('.tar')}.tar"


def _copy(url: str, final: Path, patience: float) -> int:
    """Copies one shard unless another process does; returns its size."""
    with final.with_name(f".{final.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the process ends, however it ends
        if not final.exists():
            temporary = final.with_name(f".{final.name}.part")
            with closing(open_url(url, patience)) as source, temporary.open("wb") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
            os.replace(temporary, final)
    return final.stat().st_size
