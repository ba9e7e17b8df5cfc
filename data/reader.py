"""Shards to batches: indexed reads in a pure order, so that resuming is a matter of one number."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.config import DataSettings
from data.errors import DataError
from data.images import decode, fit
from data.index import ShardIndex, load_index
from data.order import Order, positions

GIVE_UP = 100  # samples in a row that cannot be used: then it is not a sample that is broken, but the data set


class Reject(Exception):
    """A sample that cannot be used; the message is the reason under which it is counted."""


@dataclass
class Batch:
    """One rank's micro-batch. index: the samples' places in the step's global batch (for per-sample noise); images:
    float32 [B, 3, R, R] in [-1, 1]; original_sizes and crops: int64 [B, 2], (height, width) and (top, left) in pixels;
    skipped: rejected samples by reason."""

    index: list[int]
    captions: list[str]
    meta: list[dict]
    images: Tensor | None
    original_sizes: Tensor | None
    crops: Tensor | None
    skipped: dict[str, int]


class ShardDataset(Dataset):
    """Samples by global position. A sample without caption or image is left out from the start; one that turns out
    broken is replaced by the next in the order, the same on every rank and every run, and counted by reason."""

    def __init__(self, shards: list[Path], settings: DataSettings, seed: int, images: bool):
        """Raises DataError if a shard cannot be read or if no sample can be used, with the counts by reason."""
        self.settings, self.images = settings, images
        indices = [load_index(path) for path in shards]
        self.rejected: Counter[str] = Counter()
        kept = [self._usable(index) for index in indices]
        self.shards, self.keys = shards, np.concatenate([i.keys[k] for i, k in zip(indices, kept, strict=True)])
        self.shard = np.repeat(np.arange(len(shards)), [len(k) for k in kept])
        wanted = {settings.caption_key, "json"} | (set(settings.image_keys) if images else set())
        self.places = {
            e: np.concatenate([self._places(i, k, e) for i, k in zip(indices, kept, strict=True)])
            for e in sorted(wanted)
        }
        if len(self.keys) == 0:
            raise DataError(f"{self._where()}: none of the samples can be used: {_counts(self.rejected)}")
        self.order = Order(len(self.keys), seed)
        self._files: dict[int, int] = {}
        self._process = 0

    def _where(self) -> str:
        return f"shard {self.shards[0]}" + (f" and {len(self.shards) - 1} more" if len(self.shards) > 1 else "")

    def _usable(self, index: ShardIndex) -> np.ndarray:
        """Row numbers of the samples that have what is wanted; counts the others by reason."""
        column = index.column(self.settings.caption_key)
        caption = index.size[:, column] > 0 if column is not None else np.zeros(len(index.keys), bool)
        self.rejected[f"no caption (.{self.settings.caption_key})"] += int((~caption).sum())
        usable = caption
        if self.images:
            columns = [c for e in self.settings.image_keys if (c := index.column(e)) is not None]
            image = (index.size[:, columns] > 0).any(1) if columns else np.zeros(len(index.keys), bool)
            self.rejected[f"no image (.{', .'.join(self.settings.image_keys)})"] += int((caption & ~image).sum())
            usable = caption & image
        self.rejected = +self.rejected
        return np.flatnonzero(usable)

    @staticmethod
    def _places(index: ShardIndex, rows: np.ndarray, extension: str) -> np.ndarray:
        """Offsets and sizes of one kind of member, int64 [rows, 2]; -1 where missing."""
        column = index.column(extension)
        if column is None:
            return np.full((len(rows), 2), -1, dtype=np.int64)
        return np.stack([index.offset[rows, column], index.size[rows, column]], axis=1)

    def __len__(self) -> int:
        return len(self.keys)

    def _read(self, row: int, extension: str) -> bytes | None:
        offset, size = self.places[extension][row]
        if size <= 0:
            return None
        if self._process != os.getpid():  # a forked loader process must not share file positions and closings
            self._files, self._process = {}, os.getpid()
        shard = int(self.shard[row])
        if shard not in self._files:
            if len(self._files) >= 64:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        raw = os.pread(self._files[shard], int(size), int(offset))
        if len(raw) < size:
            raise DataError(
                f"shard {self.shards[shard]}: ends in the middle of {self.keys[row]}: it changed since it was indexed"
            )
        return raw

    def sample(self, row: int) -> dict:
        """One sample by row: caption, meta and, if images are wanted, image, original_size and crop. Raises Reject."""
        try:
            caption = (self._read(row, self.settings.caption_key) or b"").decode().strip()
            meta = json.loads(self._read(row, "json") or b"{}")
        except UnicodeDecodeError as error:
            raise Reject("caption is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise Reject("json does not parse") from error
        if not caption:
            raise Reject("empty caption")
        sample = {"caption": caption, "meta": meta}
        if self.images:
            raw = next(r for e in self.settings.image_keys if (r := self._read(row, e)) is not None)
            try:
                image = decode(raw)
            except RuntimeError as error:
                raise Reject("image does not decode") from error
            sample["image"], sample["crop"] = fit(image, self.settings.resolution)
            sample["original_size"] = tuple(image.shape[1:])
        return sample

    def __getitem__(self, position: int) -> dict:
        """The sample at a global position, or the next usable one of its epoch. Raises DataError after GIVE_UP misses."""
        skipped: Counter[str] = Counter()
        start = position - position % len(self)
        for miss in range(GIVE_UP):
            row = self.order.row(start + (position + miss) % len(self))
            try:
                return self.sample(row) | {"skipped": skipped}
            except Reject as reason:
                skipped[str(reason)] += 1
        where = f"{self.shards[self.shard[row]]}, key {self.keys[row]}"
        raise DataError(f"{GIVE_UP} samples in a row cannot be used ({_counts(skipped)}); the last one: {where}")


def _counts(reasons: Counter) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "the shards are empty"


@dataclass(frozen=True)
class _Plan:
    """Endless batches of global positions for one rank, from a step on."""

    start_step: int
    rank: int
    world: int
    micro_batch: int
    accumulation: int

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            for part in range(self.accumulation):
                yield list(positions(step, part, self.rank, self.world, self.micro_batch, self.accumulation))
            step += 1


def collate(samples: list[dict]) -> dict:
    """Stacks samples; plain containers, so that they pass between loader processes."""
    batch = {"captions": [s["caption"] for s in samples], "meta": [s["meta"] for s in samples]}
    batch["skipped"] = dict(sum((s["skipped"] for s in samples), Counter()))
    if "image" in samples[0]:
        batch["images"] = torch.stack([s["image"] for s in samples])
        batch["original_sizes"] = torch.tensor([s["original_size"] for s in samples])
        batch["crops"] = torch.tensor([s["crop"] for s in samples])
    return batch


class Batches:
    """Endless micro-batches of one rank. `next()` gives one micro-step; `accumulation` of them make a step."""

    def __init__(
        self,
        dataset: ShardDataset,
        rank: int,
        world: int,
        micro_batch: int,
        accumulation: int,
        start_step: int,
        pin: bool,
    ):
        self.plan = _Plan(start_step, rank, world, micro_batch, accumulation)
        workers = dataset.settings.workers
        loader = DataLoader(
            dataset,
            batch_sampler=self.plan,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin,
            prefetch_factor=4 if workers else None,
            # its own generator: the loader would otherwise draw from the global one, once a start, and break resume
            generator=torch.Generator().manual_seed(0),
        )
        self._batches = iter(loader)
        self._part = 0

    def __next__(self) -> Batch:
        raw = next(self._batches)
        p = self.plan
        index = positions(0, self._part, p.rank, p.world, p.micro_batch, p.accumulation)
        self._part = (self._part + 1) % p.accumulation
        none = dict.fromkeys(("images", "original_sizes", "crops"))
        return Batch(index=list(index), **(none | raw))

    def close(self) -> None:
        """Ends the loader processes."""
        self._batches = None
