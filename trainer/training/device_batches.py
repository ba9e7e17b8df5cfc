"""Copies the next micro-batch to the GPU while it works on the present one."""

from types import ModuleType

import torch
from torch import Tensor

from data.loader import Batch, Batches


def on_device(batches: Batches, device: torch.device) -> "Batches | DeviceBatches":
    """The same micro-batches in the same order, with their images and encoded tensors on the device; unchanged on a CPU."""
    return DeviceBatches(batches, device, torch.cuda) if device.type == "cuda" else batches


class DeviceBatches:
    """Reads one micro-batch ahead and copies it on a stream of its own, from the loader's pinned memory. What it has read
    ahead is no state: a resumed run opens its batches at its step. Without this the copy would start after an update, at
    whose end the host waits for the GPU."""

    def __init__(self, batches: Batches, device: torch.device, streams: ModuleType):
        """streams: torch.cuda, or what has its Stream, stream and current_stream."""
        self._batches, self._device, self._streams = batches, device, streams
        self._stream = streams.Stream(device)
        self._ahead: Batch | Exception | None = None

    def __iter__(self) -> "DeviceBatches":
        return self

    def __next__(self) -> Batch:
        """The next micro-batch; what was raised while it was read ahead is raised here."""
        batch, self._ahead = self._ahead or self._read(), None
        if isinstance(batch, Exception):
            raise batch
        current = self._streams.current_stream(self._device)
        current.wait_stream(self._stream)  # for this batch's copies: the next one's are not queued yet
        for tensor in _tensors(batch).values():
            tensor.record_stream(current)  # its memory is not used again before the present stream is done with it
        self._ahead = self._read()
        return batch

    def _read(self) -> Batch | Exception:
        try:
            batch = next(self._batches)
        except Exception as error:
            return error
        with self._streams.stream(self._stream):
            moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in _tensors(batch).items()}
        batch.images, batch.cached = moved.pop("images", None), moved
        return batch

    def close(self) -> None:
        self._ahead = None
        self._batches.close()


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return batch.cached | ({} if batch.images is None else {"images": batch.images})
