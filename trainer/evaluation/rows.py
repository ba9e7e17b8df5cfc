"""Rows of numbers per image, in files that outlive a killed job.

Every network gives each image a row: a feature vector, or a score. Rows are written in chunks of consecutive images, which
any process may make: what a chunk holds does not depend on how many processes there are. A restarted job makes the missing
chunks only.
"""

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint.files import write_text
from trainer.distributed.world import World, barrier, from_main

KEY = "key.json"  # what the rows are of: rows of anything else are removed


@dataclass(frozen=True)
class Rows:
    """The rows of `total` images below a folder that all processes share. Blocks are [N, D], one per network."""

    folder: Path
    total: int
    chunk: int

    @classmethod
    def open(cls, folder: Path, total: int, chunk: int, key: dict, world: World, beside: Path | None = None) -> "Rows":
        """Opens the folder, and empties it if its rows are of something else. Every rank must call it. beside: a folder that
        belongs to the rows, and is emptied with them."""
        if world.main:
            file = folder / KEY
            key = json.loads(json.dumps(key | {"total": total, "chunk": chunk}))
            if not file.exists() or json.loads(file.read_text()) != key:
                for stale in (folder, beside) if beside else (folder,):
                    shutil.rmtree(stale, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
                write_text(json.dumps(key, indent=2) + "\n", file, durable=False)
        barrier(world)
        return cls(folder, total, chunk)

    @classmethod
    def shared(cls, folder: Path, total: int, chunk: int) -> "Rows":
        """Opens a folder whose name says what the rows are of, and that several jobs may fill at the same time."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, total, chunk)

    def file(self, number: int) -> Path:
        return self.folder / f"rows-{number:06d}.safetensors"

    @property
    def chunks(self) -> int:
        return -(-self.total // self.chunk)

    def images(self, number: int) -> range:
        """The images of a chunk."""
        return range(number * self.chunk, min((number + 1) * self.chunk, self.total))

    def missing(self, world: World) -> list[int]:
        """This rank's share of the chunks that are still to be made. Every rank must call it."""
        return from_main(self._missing() if world.main else None, world)[world.rank :: world.size]

    def _missing(self) -> list[int]:
        # By a listing: a network file system remembers for a while that a file which was looked for is not there.
        names = {file.name for file in self.folder.iterdir()}
        return [n for n in range(self.chunks) if self.file(n).name not in names or not self._whole(n)]

    def _whole(self, number: int) -> bool:
        """A job that is killed on a full disk, or with its node, may leave a file that is cut short."""
        try:
            with safe_open(self.file(number), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def write(self, number: int, blocks: dict[str, Tensor]) -> None:
        """Writes a chunk's blocks; under its final name once it is whole."""
        part = self.folder / f"rows-{number:06d}.{uuid.uuid4().hex}"  # another job may write it, too
        save_file({name: block.cpu().contiguous() for name, block in blocks.items()}, part)
        part.replace(self.file(number))

    def parts(self, block: str, rank: int = 0, size: int = 1) -> Iterator[Tensor]:
        """A block chunk by chunk, of every `size`-th chunk from the `rank`-th on."""
        for number in range(rank, self.chunks, size):
            yield self.chunk_block(number, block)

    def chunk_block(self, number: int, block: str) -> Tensor:
        with safe_open(self.file(number), "pt") as file:
            return file.get_tensor(block)

    def read(self, block: str) -> Tensor:
        """A whole block, [N, D]."""
        return torch.cat(list(self.parts(block)))

    def width(self, block: str) -> int:
        with safe_open(self.file(0), "pt") as file:
            return file.get_slice(block).get_shape()[1]

    def remove(self, world: World) -> None:
        """Removes the folder. Every rank must call it."""
        barrier(world)
        if world.main:
            shutil.rmtree(self.folder, ignore_errors=True)
