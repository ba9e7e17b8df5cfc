"""What training must know of every sample before it reads one: image sizes, caption lengths, fields of the .json.

Those of `x.tar` are stored next to it as `x.tar.facts.npz`, as far as buckets or filters have needed them. No image is decoded.
"""

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.caption_source import CaptionSource
from data.encoded import EXTENSION, RECORD_KEY
from data.errors import DataError
from data.field_column import FieldColumn
from data.filters import lookup
from data.image_size import image_size
from data.npz_files import write_npz
from data.shard_index import ShardIndex

VERSION = 1


@dataclass(frozen=True)
class Wanted:
    """Which facts are needed. image_keys: extensions of images, whose sizes are needed; empty for none. captions: whose lengths
    are needed. fields: of the .json."""

    image_keys: tuple[str, ...] = ()
    captions: CaptionSource | None = None
    fields: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.image_keys or self.captions or self.fields)

    @property
    def names(self) -> list[str]:
        """Of their arrays."""
        parts = [f"size {' '.join(self.image_keys)}"] * bool(self.image_keys)
        parts += [f"caption {self.captions.key} {self.captions}"] if self.captions else []
        return parts + [f"field {name} {part}" for name in self.fields for part in FieldColumn.__dataclass_fields__]


class ShardFacts:
    """The facts of one shard's samples, as its index orders them."""

    def __init__(self, wanted: Wanted, arrays: dict[str, np.ndarray]):
        self._wanted, self._arrays = wanted, arrays

    @property
    def sizes(self) -> np.ndarray:
        """Height and width in pixels as images are decoded, int32 [N, 2]; 0 where no header can be read."""
        return self._arrays[Wanted(image_keys=self._wanted.image_keys).names[0]]

    @property
    def caption_lengths(self) -> np.ndarray:
        """Characters of the first usable caption, int32 [N]; -1 where there is none."""
        return self._arrays[Wanted(captions=self._wanted.captions).names[0]]

    def field(self, name: str) -> FieldColumn:
        """The values of a field of the .json."""
        return FieldColumn(*(self._arrays[array] for array in Wanted(fields=(name,)).names))


def facts_file(tar: Path) -> Path:
    """The file with a tar's facts."""
    return tar.with_name(tar.name + ".facts.npz")


def load_facts(index: ShardIndex, wanted: Wanted) -> ShardFacts:
    """The facts of a shard. Those that are not saved, or older than the tar, are read and, where possible, saved. Raises
    DataError if the shard cannot be read."""
    saved = _saved(index)
    missing = [name for name in wanted.names if name not in saved]
    if missing:
        saved |= _read(index, wanted)
        names = sorted(saved)
        arrays = {f"array_{number}": saved[name] for number, name in enumerate(names)}
        write_npz(facts_file(index.tar), arrays | {"names": np.array(names, np.str_), "stamp": _stamp(index)})
    return ShardFacts(wanted, saved)


def has_facts(index: ShardIndex, wanted: Wanted) -> bool:
    """Whether the facts of a shard are saved."""
    return not set(wanted.names) - _saved(index).keys()


def _stamp(index: ShardIndex) -> np.ndarray:
    return np.array([VERSION, *index.stamp], np.int64)


def _saved(index: ShardIndex) -> dict[str, np.ndarray]:
    try:
        with np.load(facts_file(index.tar)) as saved:
            if np.array_equal(saved["stamp"], _stamp(index)):
                return {name: saved[f"array_{number}"] for number, name in enumerate(saved["names"].tolist())}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # missing, or truncated by an interrupted copy
    return {}


def _read(index: ShardIndex, wanted: Wanted) -> dict[str, np.ndarray]:
    sizes, lengths = np.zeros((len(index), 2), np.int32), np.full(len(index), -1, np.int32)
    values: dict[str, list[object]] = {name: [None] * len(index) for name in wanted.fields}
    encoded = EXTENSION in index.extensions
    source = CaptionSource.of("txt", "") if encoded else wanted.captions
    metas = index.locate(["json"])
    files = index.locate([source.key]) if source else metas
    images = index.locate(list(wanted.image_keys))
    try:
        descriptor = os.open(index.tar, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"shard {index.tar}: {error.strerror}: check the path") from error
    try:
        for row in range(len(index)):
            meta = (
                _meta(os.pread(descriptor, max(int(metas[1][row]), 0), int(metas[0][row]))) if metas[1][row] > 0 else {}
            )
            if wanted.image_keys:
                sizes[row] = _encoded_size(meta) if encoded else _image_size(descriptor, images, row)
            if source:
                raw = os.pread(descriptor, int(files[1][row]), int(files[0][row])) if files[1][row] > 0 else b""
                lengths[row] = next((len(text) for text in _captions(source, raw, meta)), -1)
            for name, column in values.items():
                column[row] = lookup(meta, name)
    except OSError as error:
        raise DataError(f"shard {index.tar}: cannot be read: {error.strerror}: check the file system") from error
    finally:
        os.close(descriptor)
    found = {name: sizes for name in Wanted(image_keys=wanted.image_keys).names}
    found |= {name: lengths for name in Wanted(captions=wanted.captions).names}
    for name, column in values.items():
        made = FieldColumn.of(column)
        found |= dict(zip(Wanted(fields=(name,)).names, vars(made).values(), strict=True))
    return found


def _meta(raw: bytes) -> dict:
    try:
        meta = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _encoded_size(meta: dict) -> tuple[int, int]:
    """The size of the image that an encoded sample was made from."""
    try:
        height, width = meta[RECORD_KEY]["original_size"]
        return int(height), int(width)
    except (KeyError, TypeError, ValueError):
        return 0, 0


def _image_size(descriptor: int, images: tuple[np.ndarray, np.ndarray], row: int) -> tuple[int, int]:
    try:
        return image_size(descriptor, int(images[0][row]), int(images[1][row]))
    except ValueError:
        return 0, 0


def _captions(source: CaptionSource, raw: bytes, meta: dict) -> Iterator[str]:
    try:
        yield from source.captions(raw, meta).values()
    except ValueError:
        return
