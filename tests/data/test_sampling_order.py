"""The order depends on (n, seed, epoch) alone, and every split of a global batch takes the same positions."""

import numpy as np
import pytest

from data.sampling_order import BatchSplit, SampleOrder, epoch_permutation


def test_every_epoch_is_a_permutation_of_its_own():
    first, second = epoch_permutation(50, 3, 0), epoch_permutation(50, 3, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epoch_permutation(50, 4, 0))
    assert np.array_equal(first, epoch_permutation(50, 3, 0))


def test_order_known_value():
    # Must never change: a resumed run would see other samples than the run it continues.
    assert epoch_permutation(8, 0, 0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def test_order_is_the_same_in_any_sequence_of_reads():
    order = SampleOrder(7, seed=1)
    forward = [order.row(p) for p in range(21)]
    assert [order.row(p) for p in reversed(range(21))] == forward[::-1]
    assert forward[7:14] == epoch_permutation(7, 1, 1).tolist()


@pytest.mark.parametrize("world, micro_batch, accumulation", [(1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8)])
def test_splits_cover_a_step_once(world, micro_batch, accumulation):
    split = BatchSplit(world, micro_batch, accumulation)
    seen = [p for part in range(accumulation) for rank in range(world) for p in split.positions(5, part, rank)]
    assert seen == list(range(40, 48))
