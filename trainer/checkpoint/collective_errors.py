"""Files with tensors that are durable once written, and errors of a collective save that all ranks raise together."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from trainer.distributed.world import World
from trainer.errors import NodeTrouble, UserError

# How long ranks wait for each other's part of a save: as long as for any other collective of the run.
PATIENCE = datetime.timedelta(minutes=30)


def write_file(value: object, file: Path) -> None:
    """torch.save that returns when the data is on the disk. Through a handle: given a path, torch turns a full disk into an
    error that does not say so."""
    with file.open("wb") as handle:
        torch.save(value, handle)
        handle.flush()
        os.fsync(handle.fileno())


def tensor_bytes(value: object) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(v) for v in value.values())
    return sum(tensor_bytes(v) for v in value) if isinstance(value, list | tuple) else 0


def _root_cause(error: BaseException) -> BaseException:
    """The file system's error behind an exception of torch or safetensors; the exception itself if there is none."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError):
            return at
        at = at.__cause__ or at.__context__
    return error


class DeferredErrors:
    """Errors of work that all ranks share, deferred to a point that all of them reach.

    A rank that raised at once would leave the others waiting for it in a collective. Instead it defers the error, goes on to
    the next `agree`, and there all ranks learn of it. They wait there on the host (gloo), not on the device.
    """

    def __init__(self, world: World):
        self.world = world
        self.error: BaseException | None = None
        self.errno: int | None = None  # of the error that `agree` last returned
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None

    @contextlib.contextmanager
    def defer(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def agree(self) -> str | None:
        """The message of the first rank with an error, on every rank; None if all succeeded. Every rank must call it.
        Raises this rank's error if it is neither the file system's nor the user's, but a bug."""
        error, self.error = self.error, None
        mine = None
        if error is not None:
            cause = _root_cause(error)
            mine = str(cause), getattr(cause, "errno", None)
            expected = isinstance(cause, OSError | SafetensorError | UserError)
        errors: list[tuple[str, int | None] | None] = [mine]
        if self.group is not None:
            errors = [None] * self.world.size
            try:
                dist.all_gather_object(errors, mine, group=self.group)
            except RuntimeError as gone:
                raise NodeTrouble(
                    f"a rank died, or did not finish its part of a checkpoint within {PATIENCE}: check its node and the "
                    f"file system, then run the same command again ({str(gone).splitlines()[0]})"
                ) from gone
        if error is not None and not expected:
            raise error
        failed = [(rank, *about) for rank, about in enumerate(errors) if about is not None]
        if not failed:
            return None
        rank, text, self.errno = failed[0]
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return f"rank {rank}{others}: {text}" if self.world.size > 1 else text
