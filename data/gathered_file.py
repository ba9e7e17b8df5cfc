"""What a data set holds of many shards, kept in one file: opening ten thousand of them again reads no index of a single one.

The file is `.disback-HASH.npz` beside the first shard, one per list of shards and reading of them. It holds for as long as no
shard's size or time of change differs.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from data import shard_facts, shard_index
from data.gathered_shards import Gathered, Reading
from data.npz_files import write_npz

VERSION = 1  # to be raised when the same shards and settings give other samples or buckets
MANY = 100  # shards; fewer are opened from their indexes, in a tenth of a second
PREFIX, SUFFIX = ".disback-", ".npz"
HOUR, MONTH = 3600.0, 30 * 86400.0


def gather(paths: Sequence[Path], reading: Reading) -> Gathered:
    """Gathered.of(paths, reading), from the file if there are many shards. A missing, damaged or stale file is written, unless
    the folder cannot be written. Raises as Gathered.of."""
    stamp = _stamp(paths) if len(paths) > MANY else None  # before shards are read: if one changes meanwhile, it differs
    if stamp is None:
        return Gathered.of(paths, reading)
    file = _file(paths, reading)
    if found := _load(file, stamp):
        return found
    found = Gathered.of(paths, reading)
    _save(found, file, stamp, reading)
    return found


def was_gathered(paths: Sequence[Path], facts: shard_facts.Wanted) -> bool:
    """Whether these shards, as they are, were gathered with at least these facts: then all were read, and are sound."""
    stamp = _stamp(paths) if len(paths) > MANY else None
    if stamp is None:
        return False
    abouts = (_about(file, stamp) for file in paths[0].parent.glob(f"{PREFIX}*{SUFFIX}"))
    return any(about is not None and set(facts.names) <= set(about["facts"]) for about in abouts)


def _stamp(paths: Sequence[Path]) -> str | None:
    """A hash of the shards' paths, sizes and times of change; None if one cannot be found."""
    places = _places(paths)
    named, found = set(places), {}
    try:
        for folder in dict.fromkeys(map(os.path.dirname, places)):
            with os.scandir(
                folder
            ) as entries:  # on network file systems one listing is faster than many single questions
                for entry in entries:
                    if entry.path in named:
                        stat = entry.stat()
                        found[entry.path] = stat.st_size, stat.st_mtime_ns
        stamps = np.array([found[place] for place in places], np.int64)
    except (OSError, KeyError):
        return None
    return hashlib.sha256(_names(places) + stamps.tobytes()).hexdigest()


def _file(paths: Sequence[Path], reading: Reading) -> Path:
    chosen = reading.selection
    settings = (
        (VERSION, shard_index.VERSION, shard_facts.VERSION),
        (sorted(reading.want), reading.image_keys, reading.captions),
        (chosen.buckets, chosen.filters, chosen.min_size),
    )
    name = hashlib.sha256(_names(_places(paths)) + repr(settings).encode()).hexdigest()
    return paths[0].with_name(f"{PREFIX}{name[:16]}{SUFFIX}")


def _places(paths: Sequence[Path]) -> list[str]:
    """The shards' paths, the same however their folders are named."""
    parts = [os.path.split(path) for path in paths]
    folders = {folder: os.path.realpath(folder) for folder in dict.fromkeys(folder for folder, _ in parts)}
    return [os.path.join(folders[folder], name) for folder, name in parts]


def _names(places: list[str]) -> bytes:
    return b"\0".join(map(os.fsencode, places)) + b"\0\0"


def _load(file: Path, stamp: str) -> Gathered | None:
    """None if the file is missing, stale or damaged."""
    try:
        about = _about(file, stamp)
        if about is None:
            return None
        with np.load(file) as saved:
            raw, widths = saved["keys"], saved["widths"]
            ends = np.cumsum([0, *widths * saved["counts"]]).tolist()
            parts = zip(ends[:-1], ends[1:], widths.tolist(), strict=True)
            keys = [raw[start:end].view(f"S{width}") for start, end, width in parts]
            places = {what: saved[f"place_{what}"] for what in about["places"]}
            rejected = Counter(about["rejected"])
            return Gathered(saved["shards"], keys, places, saved["buckets"], rejected, about["encoding"])
    except Exception:  # whatever a damaged file causes must not end a run
        return None


def _about(file: Path, stamp: str) -> dict | None:
    """What is no array in a file; None if it is missing, stale or damaged."""
    try:
        with np.load(file) as saved:
            about = json.loads(saved["about"].tobytes())
        return about if about["stamp"] == stamp else None
    except Exception:  # as above
        return None


def _save(gathered: Gathered, file: Path, stamp: str, reading: Reading) -> None:
    """Does nothing if the folder cannot be written, or if another process does it: ranks gather the same at the same time."""
    claim = file.with_suffix(".claim")
    _tidy(file.parent)
    try:
        claim.touch(exist_ok=False)
    except OSError:
        return
    try:
        if _load(file, stamp):  # meanwhile another process has written it
            return
        about = {
            "stamp": stamp,
            "facts": reading.facts.names,
            "places": list(gathered.places),
            "rejected": gathered.rejected,
            "encoding": gathered.encoding,
        }
        arrays = {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "shards": gathered.shards,
            "keys": np.frombuffer(b"".join(keys.tobytes() for keys in gathered.keys), np.uint8),
            "counts": np.array([len(keys) for keys in gathered.keys], np.int64),
            "widths": np.array([keys.itemsize for keys in gathered.keys], np.int64),
            "buckets": gathered.buckets,
        }
        write_npz(file, arrays | {f"place_{what}": place for what, place in gathered.places.items()})
    finally:
        with suppress(OSError):
            claim.unlink()


def _tidy(folder: Path) -> None:
    """Deletes files of a month ago, and what killed processes left behind an hour ago."""
    for file in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):  # deleted by another process, or not ours to delete
            if time.time() - file.stat().st_mtime > (MONTH if file.suffix == SUFFIX else HOUR):
                file.unlink()
