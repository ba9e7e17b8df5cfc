"""Random access to the samples of shards, by position in the endless sequence of shuffled epochs."""

import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from data.captions import clean_caption
from data.encoded import EXTENSION, RECORD_KEY, TENSORS, check_same_encoding, encoding_of, unpack_tensors
from data.errors import DataError
from data.images import ImageTooLarge, decode, resize_and_crop
from data.sampling_order import SampleOrder
from data.settings import DataSettings
from data.shard_index import EMPTY, load_index, usable_rows

LARGEST = {"caption": 1 << 22, "meta": 1 << 24}  # bytes that are read of a sample; of the other members MAX_MEMBER
MAX_MEMBER = 1 << 30
GIVE_UP = 100  # consecutive unusable samples: then the data set is broken, not a sample
OPEN_FILES = 128  # shards open at a time per process; the usual limit on open files is 1024
DEFAULTS = DataSettings()


class SampleError(Exception):
    """An unusable sample; the message is the reason under which it is counted."""


def check_size(what: str, size: int) -> None:
    """Raises SampleError for a member of more bytes than is read of what it is ("caption", "meta", ...)."""
    if size > LARGEST.get(what, MAX_MEMBER):
        raise SampleError(f"{what} of more than {LARGEST.get(what, MAX_MEMBER) >> 20} MiB")


class ShardDataset(Dataset):
    """A dataset indexed by global position, not by row: dataset[p] is number p % len of epoch p // len, for any p >= 0.

    Samples that lack a requested caption or image are excluded from the start (`rejected`, by reason). A sample that
    turns out to be broken is replaced by the next one of its epoch, the same one on every rank and in every run.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        resolution: int,
        want: Collection[str] = ("image", "caption", "meta"),
        seed: int = 0,
        image_keys: list[str] = DEFAULTS.image_keys,
        caption_key: str = DEFAULTS.caption_key,
        caption_field: str = DEFAULTS.caption_field,
    ):
        """want: what to read: "image", "caption", "meta" and, from encoded samples, "latents" and "text". The other
        arguments: see DataSettings. Encoded samples have their captions in .txt, whatever these say.

        Empty shards are skipped, and counted in `rejected`. Raises DataError if a shard cannot be read, has samples but no
        usable one, or is encoded differently from the others, if there is no sample, and ValueError for an unknown
        `want`."""
        known = ("image", "caption", "meta", *TENSORS)
        if unknown := set(want) - set(known):
            raise ValueError(f"unknown want {sorted(unknown)}: use {', '.join(known)}")
        if caption_key.lower().rpartition(".")[2] == "json":
            raise DataError(
                f"caption key {caption_key!r}: a whole .json is no caption: name its field in data.caption_field "
                "(--caption-field), and leave the caption key as it was"
            )
        self.resolution, self.want = resolution, frozenset(want)
        self.paths: list[Path] = []
        self.rejected: Counter[str] = Counter()
        self._keys: list[np.ndarray] = []  # one array per shard: one for all would be as wide as the longest key
        first, self.encoding = None, None  # the first shard's index, and how all shards are encoded, if they are
        for index in map(load_index, map(Path, paths)):
            if not len(index):
                self.rejected[EMPTY] += 1
                continue
            if first is None:
                first, self.encoding = index, encoding_of(index)
                caption = self._caption_extension(caption_key, caption_field)
                extensions = self._extensions(image_keys, caption)
                columns: dict[str, list[np.ndarray]] = {what: [] for what in extensions}
                required = {what: extensions[what] for what in extensions if what != "meta"}
            check_same_encoding(first, self.encoding, index)
            rows, rejects = usable_rows(index, required, (image_keys, [caption]))
            self.rejected += rejects
            self.paths.append(index.tar)
            self._keys.append(index.keys[rows])
            for what, column in columns.items():
                column.append(np.stack(index.locate(extensions[what]), axis=1)[rows])
        if first is None:
            what = (
                f"none of the {len(paths)} shards has a sample (the first is {paths[0]})"
                if paths
                else "no shards to read"
            )
            raise DataError(f"{what}: set data.train, or build shards with `disback shards`")
        self._places = {what: np.concatenate(column) for what, column in columns.items()}  # offset, size: int64 [N, 2]
        self._first = np.cumsum([0] + [len(keys) for keys in self._keys])  # first row of each shard
        self.order = SampleOrder(int(self._first[-1]), seed)
        self._files: dict[int, int] = {}
        self._process = os.getpid()

    def _caption_extension(self, caption_key: str, caption_field: str) -> str:
        """The file extension that captions are in; sets the field of the .json that they are in."""
        self._field = "" if self.encoding else caption_field
        return "json" if self._field else DEFAULTS.caption_key if self.encoding else caption_key

    def _extensions(self, image_keys: list[str], caption: str) -> dict[str, list[str]]:
        """The file extensions of what is read."""
        reads = set(self.want - TENSORS.keys())
        if self.want & TENSORS.keys():
            reads |= {"tensors", "meta"}
        if self._field and "caption" in reads:
            reads |= {"meta"}
        every = {"caption": [caption], "image": image_keys, "tensors": [EXTENSION], "meta": ["json"]}
        return {what: every[what] for what in every if what in reads}

    def __len__(self) -> int:
        """Number of usable samples: the length of an epoch. Positions may exceed it."""
        return int(self._first[-1])

    def locate(self, row: int) -> tuple[Path, str]:
        """The shard and the key of a row."""
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        return self.paths[shard], self._keys[shard][row - self._first[shard]].decode("utf-8", "replace")

    def _open(self, shard: int) -> int:
        if self._process != os.getpid():  # in a loader process: only the parent closes the parent's files
            self._files, self._process = {}, os.getpid()
        file = self._files.pop(shard, None)
        if file is None:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            file = os.open(self.paths[shard], os.O_RDONLY)
        self._files[shard] = file  # moved to the end: the first is the least recently used
        return file

    def _read(self, row: int, what: str) -> bytes:
        """The bytes of a sample's caption, image, meta or tensors; empty if missing or not requested."""
        if what not in self._places or self._places[what][row, 1] <= 0:
            return b""
        offset, size = self._places[what][row].tolist()
        check_size(what, size)
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
            raise DataError(
                f"shard {path} ends inside key {key}: it changed during the run: restore it and start again"
            )
        return raw

    def read_member(self, row: int, what: str) -> bytes:
        """The undecoded bytes of a row's "image", "caption", "meta" or "tensors"; empty if it has none. Raises as `read`."""
        return self._read(row, what)

    def read_text(self, row: int) -> dict:
        """A row's key, caption and meta. Raises SampleError if the sample is broken, DataError if its shard is."""
        try:
            meta = json.loads(self._read(row, "meta") or b"{}")
        except (ValueError, RecursionError) as error:
            raise SampleError("json does not parse") from error
        if not isinstance(meta, dict):
            raise SampleError("json is not an object")
        return {"key": self.locate(row)[1], "caption": self._caption(row, meta), "meta": meta}

    def _caption(self, row: int, meta: dict) -> str:
        if "caption" not in self.want:
            return ""
        if self._field and self._field not in meta:
            raise SampleError(f"json has no field {self._field!r}")
        try:
            return clean_caption(meta[self._field] if self._field else self._read(row, "caption"))
        except ValueError as reason:
            raise SampleError(str(reason)) from reason

    def texts(self) -> dict[int, dict]:
        """`read_text` of every row; broken ones are left out, and counted in `rejected`."""
        found = {}
        for row in range(len(self)):
            try:
                found[row] = self.read_text(row)
            except SampleError as reason:
                self.rejected[str(reason)] += 1
        return found

    def read(self, row: int) -> dict:
        """A row's sample: as `read_text` and, if requested, the image (float32 [3, R, R] in [-1, 1]) or the tensors of
        an encoded sample as "cached" (by name, see data/encoded.py), each with original_size (h, w) and crop (top,
        left) in pixels. Raises SampleError if the sample is broken, DataError if its shard is."""
        sample = self.read_text(row)
        if "tensors" in self._places:
            record = sample["meta"].get(RECORD_KEY)
            try:
                sample["cached"] = unpack_tensors(self._read(row, "tensors"), self.want)
                for name in ("original_size", "crop"):
                    height, width = record[name]
                    sample[name] = int(height), int(width)
            except (ValueError, KeyError, TypeError) as error:
                raise SampleError("damaged encoded tensors or record") from error
        if "image" in self.want:
            raw = self._read(row, "image")
            try:
                image = decode(raw)
                sample["image"], sample["crop"] = resize_and_crop(image, self.resolution)
            except ImageTooLarge as error:
                raise SampleError("image is too large") from error
            except Exception as error:  # whatever one image causes must not end a run
                raise SampleError("image does not decode") from error
            sample["original_size"] = tuple(image.shape[1:])
        return sample

    def __getitem__(self, position: int) -> dict:
        """The sample at a global position as from `read`, or the next usable one of its epoch, with `position` (the
        requested one) and `skipped` (rejected samples in between, by reason). DataError after GIVE_UP of them."""
        n = len(self)
        start = position - position % n
        skipped: Counter[str] = Counter()
        for miss in range(min(GIVE_UP, n)):
            row = self.order.row(start + (position + miss) % n)
            try:
                return self.read(row) | {"position": position, "skipped": dict(skipped)}
            except SampleError as reason:
                skipped[str(reason)] += 1
        path, key = self.locate(row)
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.items())
        raise DataError(
            f"{skipped.total()} samples in a row are unusable ({reasons}), the last one in shard {path}, key {key}: "
            "check the shards with `disback shards --validate`"
        )

    def close(self) -> None:
        """Closes this process's files; a later read reopens them."""
        if self._process == os.getpid():
            for file in self._files.values():
                os.close(file)
        self._files = {}
