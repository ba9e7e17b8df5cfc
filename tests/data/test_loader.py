"""The samples of a step depend on the step alone: not on ranks, accumulation, workers or where a run resumed."""

import errno
import multiprocessing
import os
import signal
from collections import Counter
from itertools import islice

import pytest
import torch

from data.errors import DataError
from data.loader import Batches
from data.sampling_order import BatchSplit
from data.shard_dataset import ShardDataset
from trainer.entry import guarded


def steps(tars, n, world, micro_batch, accumulation=1, **options):
    """Per step: {place in the global batch: caption}, over all ranks."""
    split = BatchSplit(world, micro_batch, accumulation)
    ranks = [Batches(ShardDataset(tars, 8, seed=3), split, rank, **options) for rank in range(world)]
    result = []
    for _ in range(n):
        step = {}
        for batches in ranks:
            for batch in islice(batches, accumulation):
                assert len(batch.captions) == len(batch.index) == micro_batch
                step |= dict(zip(batch.index, batch.captions, strict=True))
        result.append(step)
    for batches in ranks:
        batches.close()
    return result


def test_every_split_of_a_step_has_the_same_samples_in_the_same_places(shards):
    tars = shards(20)
    wanted = steps(tars, 6, world=1, micro_batch=8)
    assert all(sorted(step) == list(range(8)) for step in wanted)
    for world, micro_batch, accumulation in [(2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)]:
        assert steps(tars, 6, world, micro_batch, accumulation) == wanted


def test_every_sample_once_per_epoch_across_batch_borders(shards):
    # 5 steps of 8 are 40 positions: two epochs of 20, though 20 is no multiple of 8
    seen = [step[i] for step in steps(shards(20), 5, world=2, micro_batch=4) for i in range(8)]
    assert Counter(seen[:20]) == Counter(seen[20:]) == Counter(f"c{i}" for i in range(20))
    assert seen[:20] != seen[20:]


def test_unread_steps_do_not_shift_samples(shards, monkeypatch):
    tars = shards(20)
    wanted = steps(tars, 7, world=1, micro_batch=4)
    read = []
    real = ShardDataset.read
    monkeypatch.setattr(ShardDataset, "read", lambda self, row, *at: read.append(row) or real(self, row, *at))
    for start in (0, 1, 3, 4):  # also between two read steps
        read.clear()
        batches = Batches(ShardDataset(tars, 8, seed=3), BatchSplit(1, 2, 2), 0, start, every=3)
        for step in range(start, 7):
            for part, batch in enumerate(islice(batches, 2)):
                due = [wanted[step][i] for i in batch.index] if step % 3 == 0 else []
                assert batch.captions == due and batch.index == [2 * part, 2 * part + 1]
                assert (batch.images is None) == (not due)
        assert len(read) == 4 * sum(step % 3 == 0 for step in range(start, 7))
        batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_and_reads_nothing_again(shards, workers, monkeypatch):
    tars = shards(20)
    wanted = steps(tars, 7, world=2, micro_batch=2, accumulation=2)
    read = []
    real = ShardDataset.read
    monkeypatch.setattr(ShardDataset, "read", lambda self, row, *at: read.append(row) or real(self, row, *at))
    resumed = steps(tars, 3, world=2, micro_batch=2, accumulation=2, start_step=4, workers=workers)
    assert resumed == wanted[4:]
    if not workers:  # a worker's reads are not seen here
        assert len(read) == 3 * 8


def test_workers_ignore_the_trainers_stop_signals(shards):
    """The trainer still reads until it has saved, and Ctrl-C or a preemption signals the whole group."""
    batches = Batches(ShardDataset(shards(20), 8), BatchSplit(1, 2), 0, workers=2)
    workers = multiprocessing.active_children()  # they may not have run a line yet
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker.pid, number)
        for _ in range(12):  # more than the prefetched ones
            assert len(next(batches).captions) == 2
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    batches.close()


def test_no_worker_is_left_if_one_fails_to_start(shards, monkeypatch):
    """Workers block signals and wait for work: joining one that never gets any would hang."""
    real, started, mask = multiprocessing.Process.start, [], signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def start(process):
        if started:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        real(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.Process, "start", start)
    with pytest.raises(OSError, match="temporarily unavailable"):
        Batches(ShardDataset(shards(20), 8), BatchSplit(1, 2), 0, workers=2)
    started[0].join(20)
    assert started[0].exitcode == -signal.SIGKILL
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transient_file_system_error_is_not_the_users_mistake(shards, workers, monkeypatch, capfd):
    """The job script retries after exit code 1 and gives up after 2; errors in a loader process must count the same."""

    def stale(self, position):
        raise DataError("shard x: Stale file handle") from OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(ShardDataset, "__getitem__", stale)
    batches = Batches(ShardDataset(shards(20), 8), BatchSplit(1, 2), 0, workers=workers)
    try:
        assert guarded(lambda: next(batches), debug=False) == 1
        assert "disback: shard x: Stale file handle" in capfd.readouterr().err
    finally:
        batches.close()


def test_workers_change_nothing(shards):
    tars = shards(20, change={4: {"png": b"broken"}, 9: {"txt": b"\xff"}})
    alone, helped = (Batches(ShardDataset(tars, 8), BatchSplit(1, 4), 0, workers=w) for w in (0, 2))
    skipped = Counter()
    for a, b in islice(zip(alone, helped, strict=True), 10):
        assert (a.captions, a.meta, a.index, a.skipped) == (b.captions, b.meta, b.index, b.skipped)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.original_sizes, b.original_sizes) and torch.equal(a.crops, b.crops)
        skipped.update(a.skipped)
    # 10 batches of 4 are two epochs: both samples come up at least twice, more often if one follows the other
    assert skipped["image does not decode"] >= 2 and skipped["caption is not UTF-8"] >= 2
    alone.close()
    helped.close()


def test_shapes(shards):
    tars = shards(20)
    batch = next(Batches(ShardDataset(tars, 12), BatchSplit(1, 4), 0))
    assert batch.images.shape == (4, 3, 12, 12) and batch.images.dtype == torch.float32
    assert batch.original_sizes.tolist() == [[8, 8]] * 4 and batch.crops.tolist() == [[0, 0]] * 4
    batch = next(Batches(ShardDataset(tars, 12, want={"caption"}), BatchSplit(1, 4), 0))
    assert batch.images is batch.original_sizes is batch.crops is None


def test_the_global_random_state_does_not_change(shards):
    dataset = ShardDataset(shards(20), 8)
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    next(Batches(dataset, BatchSplit(1, 4), 0))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_in_workers_stay_one_line(shards, workers):
    tars = shards(20, change={i: {"png": b"broken"} for i in range(20)})
    batches = Batches(ShardDataset(tars, 8), BatchSplit(1, 4), 0, workers=workers)
    with pytest.raises(DataError, match="20 x image does not decode") as error:
        next(batches)
    assert "\n" not in str(error.value)
    batches.close()


def test_closing(shards):
    batches = Batches(ShardDataset(shards(20), 8), BatchSplit(1, 4), 0, workers=1)
    next(batches)
    batches.close()
    batches.close()
    assert not torch.multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_impossible_splits(shards):
    dataset = ShardDataset(shards(20), 8)
    for rank, world, micro_batch in [(2, 2, 4), (0, 1, 0), (-1, 1, 4)]:
        with pytest.raises(ValueError):
            Batches(dataset, BatchSplit(world, micro_batch), rank)
