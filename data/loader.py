"""Endless micro-batches for one rank. The step number is the whole state: resuming decodes no sample again."""

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

from data.buckets import Size
from data.errors import DataError
from data.sampling_order import BatchSplit

PREFETCH = 4  # micro-batches that a worker prepares in advance
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
)  # the training process saves and stops; workers ignore them
NOT_READ = {
    "captions": [], "images": None, "original_sizes": None, "crops": None, "cached": {}, "meta": [], "skipped": {},
}  # fmt: skip


@dataclass
class Batch:
    """One rank's micro-batch of B samples.

    images: float32 [B, 3, H, W] in [-1, 1], or None. original_sizes, crops: int64 [B, 2], (height, width) and (top,
    left) in pixels, or None if neither images nor encoded tensors were requested. cached: the requested tensors of
    encoded samples (data/encoded.py): latent_mean, latent_std [B, C, h, w], states [B, L, D], pooled [B, P]. index:
    each sample's place in the step's global batch, for per-sample noise. skipped: rejected samples by reason. If the
    step is not read (see Batches), only index is set. size: height and width of the images in pixels, None if not known.
    """

    captions: list[str]
    images: Tensor | None
    original_sizes: Tensor | None
    crops: Tensor | None
    cached: dict[str, Tensor]
    meta: list[dict]
    index: list[int]
    skipped: dict[str, int]
    size: Size | None = None


class Batches:
    """An iterator over one rank's micro-batches; `split.accumulation` of them make a step. World size and accumulation
    decide which rank reads a sample, never which samples a step uses."""

    def __init__(
        self,
        dataset: Dataset,
        split: BatchSplit,
        rank: int,
        start_step: int = 0,
        workers: int = 0,
        every: int = 1,
    ):
        """dataset: a ShardDataset. workers: loader processes; 0 reads in this process. every: read only the steps that
        are multiples of it; they get the same samples as if all steps were read. Raises ValueError for an impossible
        split."""
        if min(split.micro_batch, split.world, split.accumulation, every) < 1 or start_step < 0:
            raise ValueError(f"no batches for {split}, {start_step=}, {every=}")
        if not 0 <= rank < split.world:
            raise ValueError(f"rank {rank} is not one of the {split.world} ranks of {split}")
        self._split, self._rank = split, rank
        self._step, self._part, self._every = start_step, 0, every
        reading = {
            "num_workers": workers,
            "pin_memory": torch.cuda.is_available(),
            "prefetch_factor": PREFETCH if workers else None,
            # A generator of its own: otherwise the loader draws a seed from the global one, and a resumed run differs.
            "generator": torch.Generator().manual_seed(0),
        }
        with stop_signals_blocked():
            self._batches: Iterator[dict | DataError] | None = iter(self._loader(dataset, reading))

    def _loader(self, dataset: Dataset, reading: dict) -> DataLoader:
        """The collated micro-batches from the first step on. reading: how DataLoader reads."""
        places = _PositionSampler(self._split, self._rank, self._step, self._every)
        return DataLoader(_MicroBatches(dataset), batch_sampler=places, collate_fn=collate, **reading)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch. Raises DataError if samples cannot be read, RuntimeError after close()."""
        if self._batches is None:
            raise RuntimeError("these batches are closed")
        fields = next(self._batches) if self._step % self._every == 0 else NOT_READ
        if isinstance(fields, DataError):
            raise fields
        index = list(self._split.rows(self._part, self._rank))
        self._part = (self._part + 1) % self._split.accumulation
        self._step += self._part == 0
        return Batch(**fields, index=index)

    def close(self) -> None:
        """Stops the loader processes. Calling it twice is harmless."""
        self._batches = None


@dataclass(frozen=True)
class _PositionSampler:
    """Endless batch sampler: the global positions of each micro-batch, for the steps that are read."""

    split: BatchSplit
    rank: int
    start_step: int
    every: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(-(-self.start_step // self.every) * self.every, self.every):
            for part in range(self.split.accumulation):
                yield list(self.split.positions(step, part, self.rank))


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Blocks STOP_SIGNALS while loader processes start; they inherit the mask and so never see one.

    A signal to the whole process group (Ctrl-C, preemption) is for the trainer, which still reads until it has saved; a
    worker ends by itself when its parent is gone. If one worker fails to start, the others are killed: they would wait
    for work forever, and this process for them.
    """
    before, others = signal.pthread_sigmask(signal.SIG_BLOCK, ()), set(multiprocessing.active_children())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _MicroBatches(Dataset):
    """Reads whole micro-batches. A DataError is returned, not raised: raised in a loader process, it would reach the
    user wrapped in that process's traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, positions: list[int]) -> list[dict] | DataError:
        try:
            return [self.dataset[position] for position in positions]
        except DataError as error:
            error.errno = getattr(error.__cause__, "errno", None)  # __cause__ is lost when the error is pickled
            return error


def collate(samples: list[dict] | DataError) -> dict | DataError:
    """Stacks samples into a Batch's fields, except `index`. A plain dict, so that the loader can pin its tensors."""
    if isinstance(samples, DataError):
        return samples
    skipped: Counter[str] = Counter()
    for sample in samples:
        if sample["skipped"]:
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
        "size": samples[0].get("size"),
    }
