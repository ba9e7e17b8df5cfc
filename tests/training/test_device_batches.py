"""Micro-batches that are copied to the device ahead of their use."""

import pytest
import torch

from data.errors import DataError
from data.loader import Batch
from trainer.training.device_batches import DeviceBatches, on_device


class Source:
    """Batches numbered from a step on: number 1 is not read, number 3 cannot be read."""

    def __init__(self, first=0):
        self.number, self.closed = first, False

    def __next__(self):
        number, self.number = self.number, self.number + 1
        if number == 3:
            raise DataError("number 3")
        read = number != 1
        images = torch.full((2, 3, 4, 4), float(number)) if read else None
        cached = {"latent_mean": torch.full((2, 4), -float(number))} if read else {}
        return Batch([f"c{number}"], images, None, None, cached, [], [number], {})

    def close(self):
        self.closed = True


def test_a_cpu_gets_the_batches_as_they_are():
    source = Source()
    assert on_device(source, torch.device("cpu")) is source


@pytest.fixture
def recorded(monkeypatch):
    """The tensors whose streams were recorded: a CPU's tensors have none."""
    tensors = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: tensors.append(tensor))
    return tensors


def read_ahead(source):
    return DeviceBatches(source, torch.device("cpu"), torch.cpu)  # a CPU's streams do nothing


def test_one_batch_is_read_ahead(recorded):
    source = Source()
    batches = read_ahead(source)
    assert source.number == 0  # nothing before the first is asked for
    first = next(batches)
    assert source.number == 2 and first.index == [0] and first.captions == ["c0"]
    assert [id(tensor) for tensor in recorded] == [id(first.cached["latent_mean"]), id(first.images)]
    second = next(batches)
    assert second.index == [1] and second.images is None and second.cached == {} and len(recorded) == 2
    third = next(batches)  # number 3 has failed by now
    assert (third.images == 2).all() and (third.cached["latent_mean"] == -2).all() and len(recorded) == 4
    with pytest.raises(DataError, match="number 3"):
        next(batches)
    assert next(batches).index == [4]
    batches.close()
    assert source.closed


def test_batches_are_those_of_the_source(recorded):
    for first in (4, 6):  # also of a run that is resumed
        source, batches = Source(first), read_ahead(Source(first))
        for _ in range(5):
            plain, ahead = next(source), next(batches)
            assert plain.index == ahead.index and plain.captions == ahead.captions
            assert torch.equal(plain.images, ahead.images) and torch.equal(
                plain.cached["latent_mean"], ahead.cached["latent_mean"]
            )


def test_tensors_are_on_the_device(recorded):
    batches = DeviceBatches(Source(), torch.device("meta"), torch.cpu)
    batch = next(batches)
    assert batch.images.device.type == "meta" == batch.cached["latent_mean"].device.type
