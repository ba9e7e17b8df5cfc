"""Weights folders written by rank 0 in the background, while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from trainer.distributed import World, first_problem
from trainer.errors import UserError


class FolderWriter:
    """One folder at a time: a second one waits for the first, so that no more than two are in host memory. Only rank 0
    has anything to write; no other rank waits for its disk until `join`."""

    def __init__(self, world: World):
        self.world = world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="node-writer")
        self._writing: list[Future] = []

    def begin(self, write: Callable[..., None], state: dict[str, Tensor], folder: Path, about: dict) -> None:
        """Begins to write a whole state dict, which nobody else may change, in the dtype that it has. write: what makes a
        folder of it, as `TrainStage.saver`."""
        if self._writing:
            self._writing[-1].exception()  # waits; `join` raises it
        self._writing.append(self._thread.submit(write, state, folder=folder, about=about))

    def join(self) -> None:
        """Waits until everything is on the disk. Every rank must call it; all raise the same UserError if it failed."""
        problem = None
        for future in self._writing:
            if error := future.exception():
                problem = f"weights could not be written: {error}: make room or choose another folder, then go on"
        self._writing = []
        if problem := first_problem(problem, self.world):
            raise UserError(problem)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
