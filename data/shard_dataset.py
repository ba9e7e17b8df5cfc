"""Random access to the samples of shards, by position in the endless sequence of shuffled epochs."""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from data.bucket_order import BucketOrder
from data.buckets import Size
from data.caption_source import CaptionSource
from data.captions import clean_caption
from data.draws import uniform
from data.encoded import CAPTIONS_KEY, RECORD_KEY, TENSORS, unpack_tensors
from data.errors import DataError
from data.gathered_file import gather
from data.gathered_shards import ENCODED_CAPTIONS, Reading
from data.images import ImageTooLarge, decode, resize_and_crop
from data.sampling_order import SampleOrder
from data.selected_rows import NothingSelectedError
from data.selection import Selection
from data.settings import DataSettings

LARGEST = {"caption": 1 << 22, "meta": 1 << 24}  # bytes that are read of a sample; of the other members MAX_MEMBER
MAX_MEMBER = 1 << 30
GIVE_UP = 100  # consecutive unusable samples: then the data set is broken, not a sample
OPEN_FILES = 128  # shards open at a time per process; the usual limit on open files is 1024
DEFAULTS = DataSettings()
NO_SELECTION = Selection()


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

    With buckets, the order is that of data/bucket_order.py: dataset[p] is of step p // batch, whose samples are of one bucket,
    and a broken one is replaced within its bucket. shapes: (height, width) by bucket; a single square without buckets.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        resolution: int,
        want: Collection[str] = ("image", "caption", "meta"),
        seed: int = 0,
        image_keys: list[str] = DEFAULTS.image_keys,
        caption_key: str = DEFAULTS.caption_key,
        caption_field: str | dict[str, float] = DEFAULTS.caption_field,
        selection: Selection = NO_SELECTION,
        batch: int = 1,
    ):
        """want: what to read: "image", "caption", "meta" and, from encoded samples, "latents" and "text". The other
        arguments: see DataSettings. Encoded samples have their captions in .txt, whatever these say, unless several were encoded.
        batch: samples per step, for the order with buckets.

        Empty shards are skipped, and counted in `rejected`. Raises DataError if a shard cannot be read, has samples but no
        usable one, or is encoded differently from the others, if there is no sample, NothingSelectedError if the selection
        leaves none, and ValueError for an unknown `want`."""
        known = ("image", "caption", "meta", *TENSORS)
        if unknown := set(want) - set(known):
            raise ValueError(f"unknown want {sorted(unknown)}: use {', '.join(known)}")
        if caption_key.lower().rpartition(".")[2] == "json":
            raise DataError(
                f"caption key {caption_key!r}: a whole .json is no caption: name its field in data.caption_field "
                "(--caption-field), and leave the caption key as it was"
            )
        self.resolution, self.want = resolution, frozenset(want)
        self.seed, self.selection = seed, selection
        self.shapes = selection.buckets or ((resolution, resolution),)
        configured = self._source = CaptionSource.of(caption_key, caption_field)
        paths = [Path(path) for path in paths]
        gathered = gather(paths, Reading(self.want, tuple(image_keys), configured, selection))
        self.encoding, self.rejected = gathered.encoding, gathered.rejected
        if self.encoding:
            self._source = ENCODED_CAPTIONS
            self._several = configured if isinstance(caption_field, dict) and caption_field else None
        self.paths = [paths[shard] for shard in gathered.shards.tolist()]
        self._keys, self._places = gathered.keys, gathered.places
        self._first = np.cumsum([0] + [len(keys) for keys in self._keys])  # first row of each shard
        if not len(self):
            raise NothingSelectedError(self.paths[0].parent if len(paths) > 1 else self.paths[0], self.rejected)
        self._bucket = gathered.buckets
        self.counts = np.bincount(self._bucket, minlength=len(self.shapes)).tolist()  # samples by bucket
        self.order = (
            BucketOrder(self._bucket, seed, batch) if selection.buckets else SampleOrder(int(self._first[-1]), seed)
        )
        self._files: dict[int, int] = {}
        self._process = os.getpid()

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

    def read_text(self, row: int, position: int | None = None) -> dict:
        """A row's key, caption and meta; of several captions that of a global position (default: the row's number). Raises
        SampleError if the sample is broken, DataError if its shard is."""
        try:
            raw = self._read(row, "meta")
            meta = json.loads(raw) if raw else {}
        except (ValueError, RecursionError) as error:
            raise SampleError("json does not parse") from error
        if not isinstance(meta, dict):
            raise SampleError("json is not an object")
        return {"key": self.locate(row)[1], **self._caption(row, meta, position), "meta": meta}

    def _caption(self, row: int, meta: dict, position: int | None) -> dict:
        """The caption and, where an encoded sample has several, its source."""
        if "caption" not in self.want:
            return {"caption": ""}
        position = row if position is None else position
        try:
            record = meta.get(RECORD_KEY) if self.encoding else None
            if isinstance(record, dict) and isinstance(found := record.get(CAPTIONS_KEY), dict):
                chosen = next(iter(found))
                if self._several:
                    chosen = self._several.choose(self._several.known(found), self.seed, position)
                return {"caption": clean_caption(found[chosen]), "source": chosen}
            found = self._source.captions(self._caption_file(row), meta)
        except ValueError as reason:
            raise SampleError(str(reason)) from reason
        return {"caption": found[self._source.choose(found, self.seed, position)]}

    def texts(self) -> dict[int, dict]:
        """`read_text` of every row; broken ones are left out, and counted in `rejected`."""
        found = {}
        for row in range(len(self)):
            try:
                found[row] = self.read_text(row)
            except SampleError as reason:
                self.rejected[str(reason)] += 1
        return found

    def captions(self, row: int) -> dict[str, str]:
        """All captions of a row by source. Raises SampleError and DataError."""
        try:
            return self._source.captions(self._caption_file(row), self.read_text(row)["meta"])
        except ValueError as reason:
            raise SampleError(str(reason)) from reason

    def _caption_file(self, row: int) -> bytes:
        return b"" if self._source.extensions == ["json"] else self._read(row, "caption")

    def size(self, row: int) -> Size:
        """Height and width in pixels of the image that a row is trained as."""
        return self.shapes[self._bucket[row]]

    def read(self, row: int, position: int | None = None) -> dict:
        """A row's sample: as `read_text` with `size` and, if requested, the image (float32 [3, height, width] in [-1, 1]) or the
        tensors of an encoded sample as "cached" (by name, see data/encoded.py), each with original_size (h, w) and crop
        (top, left) in pixels. position: for random crops and flips, which only samples of a global position have. Raises
        SampleError if the sample is broken, DataError if its shard is."""
        sample = self.read_text(row, position) | {"size": self.size(row)}
        if "tensors" in self._places:
            record = sample["meta"].get(RECORD_KEY)
            try:
                sample["cached"] = unpack_tensors(self._read(row, "tensors"), self.want, sample.get("source"))
                for name in ("original_size", "crop"):
                    height, width = record[name]
                    sample[name] = int(height), int(width)
            except (ValueError, KeyError, TypeError) as error:
                raise SampleError("damaged encoded tensors or record") from error
        if "image" in self.want:
            raw = self._read(row, "image")
            try:
                image = decode(raw)
                sample["image"], sample["crop"] = resize_and_crop(image, sample["size"], *self._cut(position))
            except ImageTooLarge as error:
                raise SampleError("image is too large") from error
            except Exception as error:  # whatever one image causes must not end a run
                raise SampleError("image does not decode") from error
            sample["original_size"] = tuple(image.shape[1:])
        return sample

    def _cut(self, position: int | None) -> tuple[tuple[float, float] | None, bool]:
        """Where the image of a global position is cropped, None for the centre, and whether it is mirrored."""
        if position is None:
            return None, False
        chosen = self.selection
        where = tuple(uniform(self.seed, position, side) for side in ("top", "left")) if chosen.random_crop else None
        return where, chosen.flip and uniform(self.seed, position, "flip") < 0.5

    def __getitem__(self, position: int) -> dict:
        """The sample at a global position as from `read`, or the next usable one of its epoch, with `position` (the
        requested one) and `skipped` (rejected samples in between, by reason). DataError after GIVE_UP of them."""
        return self._first_usable(self.order.candidates(position), position)

    def example(self, number: int, bucket: int | None = None) -> dict:
        """A sample for looking at: dataset[number], or with buckets the one at a position of a bucket's own sequence (default:
        the bucket with most samples)."""
        if not self.selection.buckets:
            return self[number]
        bucket = self.main_bucket if bucket is None else bucket
        return self._first_usable(self.order.candidates_in(bucket, number), number)

    @property
    def main_bucket(self) -> int:
        """The bucket with most samples."""
        return int(np.argmax(self.counts))

    def _first_usable(self, candidates: Iterator[int], position: int) -> dict:
        skipped: Counter[str] = Counter()
        for row in islice(candidates, GIVE_UP):
            try:
                return self.read(row, position) | {"position": position, "skipped": dict(skipped)}
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
