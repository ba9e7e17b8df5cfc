"""Samples by position: indexed reads in a pure order. `Batches` (data/loader.py, also found here) serves them."""

import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from data.encoded import MEMBER, RECORD, TENSORS, check_same, made_by, unpack
from data.errors import DataError
from data.images import decode, fit
from data.loader import Batch, Batches
from data.sampling_order import Order
from data.settings import DataSettings
from data.shard_index import load_index, usable_rows

__all__ = ["Batch", "Batches", "Reject", "ShardDataset"]

GIVE_UP = 100  # unusable samples in a row: then not a sample is broken but the data set
OPEN_FILES = 128  # shards held open a process; the usual limit on open files is 1024
DEFAULTS = DataSettings()


class Reject(Exception):
    """A sample that cannot be used; the message is the reason under which it is counted."""


class ShardDataset(Dataset):
    """Samples by global position, not by row: dataset[p] is number p % len of epoch p // len, for any p >= 0.

    Samples without a wanted caption or image are left out from the start (`rejected`, by reason). One that turns out to
    be broken is replaced by the next in its epoch, alike on every rank and in every run.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        resolution: int,
        want: Collection[str] = ("image", "caption", "meta"),
        seed: int = 0,
        image_keys: list[str] = DEFAULTS.image_keys,
        caption_key: str = DEFAULTS.caption_key,
    ):
        """want: what to read of "image", "caption" and "meta", and of encoded samples "latents" and "text"; the rest
        costs no read. Raises DataError if a shard cannot be read or holds no usable sample, or if encoded shards and
        others are mixed, ValueError for an unknown `want`."""
        if unknown := set(want) - {"image", "caption", "meta", *TENSORS}:
            raise ValueError(f"want names {sorted(unknown)}: known are image, caption, meta, {', '.join(TENSORS)}")
        cached = not TENSORS.keys().isdisjoint(want)
        self.paths, self.resolution, self.want = [Path(p) for p in paths], resolution, frozenset(want)
        reads = self.want - TENSORS.keys() | ({"cache", "meta"} if cached else set())
        self.rejected: Counter[str] = Counter()
        extensions = {"image": image_keys, "caption": [caption_key], "meta": ["json"], "cache": [MEMBER]}
        columns: dict[str, list[np.ndarray]] = {what: [] for what in reads}
        self._keys: list[np.ndarray] = []  # one array a shard: the longest key of all would set the width of one array
        first, self.made_by = None, None  # the first shard's index, and what made all shards, if they are encoded
        for path in self.paths:
            index = load_index(path)
            if first is None:
                first, self.made_by = index, made_by(index)
            check_same(first, self.made_by, index)
            rows, rejects = usable_rows(
                index,
                caption_key if "caption" in want else None,
                image_keys if "image" in want else None,
                MEMBER if cached else None,
            )
            self.rejected += rejects
            self._keys.append(index.keys[rows])
            for what, column in columns.items():
                column.append(np.stack(index.member(extensions[what]), axis=1)[rows])
        if not self._keys:
            raise DataError("no shards to read: name some in data.train, or build them with `disback shards`")
        self._places = {what: np.concatenate(column) for what, column in columns.items()}  # offset, size: int64 [N, 2]
        self._first = np.cumsum([0] + [len(keys) for keys in self._keys])  # first row of each shard
        self.order = Order(int(self._first[-1]), seed)
        self._files: dict[int, int] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        """Usable samples, which is the length of an epoch; positions go on beyond it."""
        return int(self._first[-1])

    def locate(self, row: int) -> tuple[Path, str]:
        """Shard and key of a row."""
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        return self.paths[shard], self._keys[shard][row - self._first[shard]].decode("utf-8", "replace")

    def _open(self, shard: int) -> int:
        if self._process != os.getpid():  # a loader process: its parent's files are its parent's to close
            self._files, self._process = {}, os.getpid()
        file = self._files.pop(shard, None)
        if file is None:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            file = os.open(self.paths[shard], os.O_RDONLY)
        self._files[shard] = file  # at the end: the first is the one not used for the longest time
        return file

    def _read(self, row: int, what: str) -> bytes:
        """The bytes of a sample's caption, image, meta or cache; empty if it has none or it is not wanted."""
        if what not in self._places or self._places[what][row, 1] <= 0:
            return b""
        offset, size = self._places[what][row].tolist()
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        try:
            raw = os.pread(self._open(shard), size, offset)
        except OSError as error:
            path, key = self.locate(row)
            raise DataError(
                f"shard {path}, key {key}: cannot be read: {error.strerror}: check the file system"
            ) from error
        if len(raw) < size:
            path, key = self.locate(row)
            raise DataError(f"shard {path} ends inside key {key}: it changed while in use: restore it and start again")
        return raw

    def read_text(self, row: int) -> dict:
        """A sample without its image, by row: key, caption, meta. Raises Reject if it is broken, DataError if its shard
        is."""
        try:
            caption = self._read(row, "caption").decode("utf-8").strip()
            meta = json.loads(self._read(row, "meta") or b"{}")
        except UnicodeDecodeError as error:
            raise Reject("text is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise Reject("json does not parse") from error
        if "caption" in self.want and not caption:
            raise Reject("empty caption")
        if not isinstance(meta, dict):
            raise Reject("json is not an object")
        return {"key": self.locate(row)[1], "caption": caption, "meta": meta}

    def read(self, row: int) -> dict:
        """A sample by row: as `read_text` and, if wanted, image float32 [3, R, R] in [-1, 1] or cached (tensors by name,
        see data.cache), and with either original_size (h, w) and crop (top, left) in pixels. Raises Reject if it is
        broken, DataError if its shard is."""
        sample = self.read_text(row)
        if "cache" in self._places:
            record = sample["meta"].get(RECORD)
            try:
                sample["cached"] = unpack(self._read(row, "cache"), self.want)
                sample["original_size"], sample["crop"] = tuple(record["original_size"]), tuple(record["crop"])
            except (ValueError, KeyError, TypeError) as error:
                raise Reject("encoded tensors or their record are damaged") from error
        if "image" in self.want:
            try:
                image = decode(self._read(row, "image"))
            except RuntimeError as error:
                raise Reject("image does not decode") from error
            sample["image"], sample["crop"] = fit(image, self.resolution)
            sample["original_size"] = tuple(image.shape[1:])
        return sample

    def __getitem__(self, position: int) -> dict:
        """The sample at a global position as `read` gives it, or the next usable one of its epoch; also `position` (the
        one asked for) and `skipped` (rejects on the way, by reason). Raises DataError after GIVE_UP rejects."""
        n = len(self)
        start = position - position % n
        skipped: Counter[str] = Counter()
        for miss in range(min(GIVE_UP, n)):
            row = self.order.sample(start + (position + miss) % n)
            try:
                return self.read(row) | {"position": position, "skipped": dict(skipped)}
            except Reject as reason:
                skipped[str(reason)] += 1
        path, key = self.locate(row)
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.items())
        raise DataError(
            f"{skipped.total()} samples in a row cannot be used ({reasons}), the last one in shard {path}, key {key}: "
            "look at the shards with `disback shards --validate`"
        )

    def close(self) -> None:
        """Closes this process's files; a later read opens them again."""
        if self._process == os.getpid():
            for file in self._files.values():
                os.close(file)
        self._files = {}
