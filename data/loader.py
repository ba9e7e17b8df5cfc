"""Endless micro-batches of one rank. Where it stands is one number, the step: resuming decodes nothing again."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.errors import DataError
from data.sampling_order import micro_batch_positions

PREFETCH = 4  # micro-batches a worker holds ready
UNREAD = {
    "captions": [], "images": None, "original_sizes": None, "crops": None, "cached": {}, "meta": [], "skipped": {},
}  # fmt: skip


@dataclass
class Batch:
    """One rank's micro-batch of B samples.

    images: float32 [B, 3, R, R] in [-1, 1]; original_sizes, crops: int64 [B, 2], (height, width) and (top, left) in
    pixels; None without images, the sizes given with cached tensors too. cached: of encoded shards, what was wanted of
    latent_mean, latent_std [B, C, h, w], states [B, L, D] and pooled [B, P]; see data.cache. index: each sample's place in
    the step's global batch, for per-sample noise. skipped: rejected samples by reason. A step that is
    not read (see Batches) has its index only.
    """

    captions: list[str]
    images: Tensor | None
    original_sizes: Tensor | None
    crops: Tensor | None
    cached: dict[str, Tensor]
    meta: list[dict]
    index: list[int]
    skipped: dict[str, int]


class Batches:
    """next() gives one micro-batch; `accumulation` of them make a step. World size and accumulation change only who
    reads a sample, never which samples a step sees."""

    def __init__(
        self,
        dataset: Dataset,
        rank: int,
        world: int,
        micro_batch: int,
        accumulation: int = 1,
        start_step: int = 0,
        workers: int = 0,
        every: int = 1,
    ):
        """dataset: a ShardDataset. workers: loader processes, 0 reads in this one. every: only steps whose number is a
        multiple of it are read; they see what they would see if all were. Raises ValueError for a split that cannot
        be."""
        if min(micro_batch, world, accumulation, every) < 1 or not 0 <= rank < world or start_step < 0:
            raise ValueError(f"no batches for {rank=} {world=} {micro_batch=} {accumulation=} {start_step=} {every=}")
        self._split = (rank, world, micro_batch, accumulation)
        self._step, self._part, self._every = start_step, 0, every
        loader = DataLoader(
            _Reader(dataset),
            batch_sampler=_Plan(start_step, every, *self._split),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=PREFETCH if workers else None,
            # Its own generator: the loader would otherwise draw a seed from the global one, and a resumed run differ.
            generator=torch.Generator().manual_seed(0),
        )
        with _signals_held():
            self._batches: Iterator[dict | DataError] | None = iter(loader)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch. Raises DataError if samples cannot be read, RuntimeError after close()."""
        if self._batches is None:
            raise RuntimeError("these batches are closed")
        fields = next(self._batches) if self._step % self._every == 0 else UNREAD
        if isinstance(fields, DataError):
            raise fields
        index = list(micro_batch_positions(0, self._part, *self._split))
        self._part = (self._part + 1) % self._split[-1]
        self._step += self._part == 0
        return Batch(**fields, index=index)

    def close(self) -> None:
        """Ends the loader processes. May be called twice."""
        self._batches = None


@dataclass(frozen=True)
class _Plan:
    """Endless lists of global positions, one a micro-batch of a step that is read."""

    start_step: int
    every: int
    rank: int
    world: int
    micro_batch: int
    accumulation: int

    def __iter__(self) -> Iterator[list[int]]:
        split = (self.rank, self.world, self.micro_batch, self.accumulation)
        for step in count(-(-self.start_step // self.every) * self.every, self.every):
            for part in range(self.accumulation):
                yield list(micro_batch_positions(step, part, *split))


@contextmanager
def _signals_held() -> Iterator[None]:
    """A signal to the whole group (Ctrl-C, a preemption) is for the trainer, which still reads until it has saved. Loader
    processes that are begun here never see one, from their first instruction on: they inherit what is blocked. One whose
    parent has gone ends by itself. If not all can be begun, those that were are killed: they would wait for work for ever,
    and this process for them."""
    before, others = signal.pthread_sigmask(signal.SIG_BLOCK, ()), set(multiprocessing.active_children())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Reader(Dataset):
    """Reads a micro-batch at once and hands a DataError back as a value: raised in a loader process, it would reach the
    user wrapped in that process's traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, positions: list[int]) -> list[dict] | DataError:
        try:
            return [self.dataset[position] for position in positions]
        except DataError as error:
            error.errno = getattr(error.__cause__, "errno", None)  # the cause itself does not survive the way here
            return error


def collate(samples: list[dict] | DataError) -> dict | DataError:
    """Stacks samples into Batch's fields, all but `index`. A plain dict, so that the loader can pin its tensors."""
    if isinstance(samples, DataError):
        return samples
    skipped: Counter[str] = Counter()
    for sample in samples:
        skipped.update(sample["skipped"])
    images, sizes = "image" in samples[0], "crop" in samples[0]
    names = samples[0].get("cached", ())
    return {
        "captions": [sample["caption"] for sample in samples],
        "images": torch.stack([sample["image"] for sample in samples]) if images else None,
        "original_sizes": torch.tensor([sample["original_size"] for sample in samples]) if sizes else None,
        "crops": torch.tensor([sample["crop"] for sample in samples]) if sizes else None,
        "cached": {name: torch.stack([sample["cached"][name] for sample in samples]) for name in names},
        "meta": [sample["meta"] for sample in samples],
        "skipped": dict(skipped),
    }
