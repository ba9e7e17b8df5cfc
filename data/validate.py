"""Validates a set of shards: counts usable and rejected samples, measures them, and finds broken shards."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from data.errors import DataError
from data.processes import in_processes
from data.settings import DataSettings
from data.shard_dataset import SampleError, ShardDataset
from data.shard_index import load_index

DEFAULTS = DataSettings()
SIDES = (256, 512, 768, 1024, 1536)  # limits of the short side, in pixels
ASPECTS = {"below 1:2": 0.5, "1:2 to 3:4": 0.75, "3:4 to 4:3": 4 / 3, "4:3 to 2:1": 2.0}  # width / height
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def validate(
    paths: Sequence[Path],
    decode: bool = False,
    settings: DataSettings = DEFAULTS,
    processes: int = 1,
    length: Callable[[str], int] = len,
) -> dict:
    """Reads every caption and image header and, with `decode`, every image, as training with these settings would. A broken
    shard is reported; the others are still validated.

    length: of a caption (default: its characters). Returns {"shards": count, "samples": usable ones, "rejects": {reason:
    count}, "bytes": total size, "caption_mean_length", "caption_lengths": {length: count}, "sizes" and "aspects" of the images
    by range, "broken": {shard: message}, "empty": [shards without samples]}.
    """
    check = partial(_shard, decode=decode, settings=settings, length=length)
    total = _Report()
    for path, report in zip(paths, in_processes(check, paths, processes), strict=True):
        total.add(path, report)
    count, lengths = sum(total.lengths.values()), total.lengths
    return {
        "shards": len(paths),
        "samples": count,
        "rejects": dict(total.rejects),
        "bytes": total.size,
        "caption_mean_length": sum(size * times for size, times in lengths.items()) / count if count else 0.0,
        "caption_lengths": dict(sorted(lengths.items())),
        "sizes": _ordered(total.sizes, [_size_name(side - 1) for side in SIDES] + [_size_name(SIDES[-1])]),
        "aspects": _ordered(total.aspects, [*ASPECTS, "above 2:1"]),
        "broken": total.broken,
        "empty": total.empty,
    }


class _Report:
    """What was found in one shard, or in all."""

    def __init__(self) -> None:
        self.size = 0
        self.rejects, self.lengths, self.sizes, self.aspects = Counter(), Counter(), Counter(), Counter()
        self.broken: dict[str, str] = {}
        self.empty: list[str] = []

    def add(self, path: Path, other: "_Report") -> None:
        self.size += other.size
        self.broken |= other.broken
        self.empty += other.empty
        if str(path) not in other.broken:
            for name in ("rejects", "lengths", "sizes", "aspects"):
                getattr(self, name).update(getattr(other, name))


def _shard(path: Path, decode: bool, settings: DataSettings, length: Callable[[str], int]) -> _Report:
    report = _Report()
    try:
        report.size = path.stat().st_size if path.exists() else 0
        if not len(load_index(path)):
            report.empty.append(str(path))
            return report
        # Requests images and captions, so that missing ones are counted.
        dataset = ShardDataset([path], settings.resolution, ("image", "caption", "meta"), 0, **settings.keys)
        report.rejects += dataset.rejected
        for row in range(len(dataset)):
            try:
                sample = dataset.read(row) if decode else dataset.read_text(row)
                size = sample.get("original_size") or image_size(dataset.read_member(row, "image"))
            except SampleError as reason:
                report.rejects[str(reason)] += 1
                continue
            report.lengths[length(sample["caption"])] += 1
            if size:
                report.sizes[_size_name(min(size))] += 1
                ratio = size[1] / size[0]
                report.aspects[next((name for name, most in ASPECTS.items() if ratio <= most), "above 2:1")] += 1
        dataset.close()
    except DataError as error:
        report.broken[str(path)] = str(error)
    return report


def image_size(raw: bytes) -> tuple[int, int] | None:
    """Height and width of an image as it is shown, by its header; None if that cannot be read."""
    try:
        with Image.open(io.BytesIO(raw)) as image:
            width, height = image.size
            return (width, height) if image.getexif().get(0x0112) in ROTATED else (height, width)
    except Exception:  # Pillow raises nearly anything for damaged data
        return None


def _size_name(side: int) -> str:
    low = max((limit for limit in SIDES if limit <= side), default=0)
    above = [limit for limit in SIDES if limit > side]
    return f"{low} to {above[0] - 1}" if above else f"{low} or more"


def _ordered(counts: Counter, names: Sequence[str]) -> dict[str, int]:
    return {name: counts[name] for name in names if counts[name]}
