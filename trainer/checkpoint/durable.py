"""Files of a checkpoint: written to the disk for certain, and what goes wrong is told by all ranks together."""

import contextlib
import datetime
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError

from trainer.distributed.world import World
from trainer.errors import NodeTrouble, UserError

# The longest that ranks wait for each other's part of a save: as long as any other collective of the run.
PATIENCE = datetime.timedelta(minutes=30)
MARGIN = 1.05  # file systems count blocks, not bytes


def write_file(value: object, file: Path) -> None:
    """torch.save to the disk, not to its cache. Through a handle: by path, torch turns a full disk into an error that
    does not say so."""
    with file.open("wb") as handle:
        torch.save(value, handle)
        handle.flush()
        os.fsync(handle.fileno())


def write_text(text: str, file: Path) -> None:
    """A small file, replaced atomically, and durable with its folder's entry."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries (a rename) are on the disk, where the file system can be asked to."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync no folders
            raise
    finally:
        os.close(handle)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path relative to it."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write where a folder is."""
    return shutil.disk_usage(folder).free


def tensor_bytes(value: object) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(v) for v in value.values())
    return sum(tensor_bytes(v) for v in value) if isinstance(value, list | tuple) else 0


def _cause(error: BaseException) -> BaseException:
    """The error of the file system behind what torch and safetensors make of it; the error itself if there is none."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError):
            return at
        at = at.__cause__ or at.__context__
    return error


class Together:
    """Work that every rank does a part of, and that is done only if all of them did theirs.

    A rank notes what went wrong and goes on to the next common point: raised at once, it would leave the others waiting
    for it in a collective. `agree` is that point. It waits between the hosts (gloo), not on the device.
    """

    def __init__(self, world: World):
        self.world = world
        self.error: BaseException | None = None
        self.errno: int | None = None  # of the trouble that was agreed on last
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def agree(self) -> str | None:
        """None if no rank noted an error, else what to tell the user: the same on every rank, which all call this.
        Raises this rank's error if that is no file system's but a fault of the program."""
        error, self.error = self.error, None
        mine = None
        if error is not None:
            cause = _cause(error)
            mine = str(cause), getattr(cause, "errno", None)
            known = isinstance(cause, OSError | SafetensorError | UserError)
        told: list[tuple[str, int | None] | None] = [mine]
        if self.group is not None:
            told = [None] * self.world.size
            try:
                dist.all_gather_object(told, mine, group=self.group)
            except RuntimeError as gone:
                raise NodeTrouble(
                    f"a rank is gone, or did not finish its part of a checkpoint in {PATIENCE}: look at its node and the "
                    f"file system, then run the same command again ({str(gone).splitlines()[0]})"
                ) from gone
        if error is not None and not known:
            raise error
        failed = [(rank, *trouble) for rank, trouble in enumerate(told) if trouble is not None]
        if not failed:
            return None
        rank, text, self.errno = failed[0]
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return f"rank {rank}{others}: {text}" if self.world.size > 1 else text


class FileWriter(TorchCheckpointEngine):
    """How DeepSpeed writes its files: durable, and noting errors, since DeepSpeed has collectives behind them."""

    def __init__(self, together: Together):
        super().__init__()
        self.together = together

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self.together.noting():
            super().makedirs(path, exist_ok)

    def save(self, state_dict: dict, path: str) -> None:
        with self.together.noting():
            write_file(state_dict, Path(path))
