"""The results folder of a run: one folder per source, written as a whole, by one job at a time."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from models.pipeline import replace_folder
from trainer.distributed.lock import LOCK, Lock
from trainer.distributed.logs import log
from trainer.distributed.world import World, from_main
from trainer.errors import UserError
from trainer.evaluation.results import UNFINISHED

LOCK_SECONDS = 5.0  # between looks at a lock that another job holds
Result = TypeVar("Result")


class ResultsFolder:
    """EVAL/ in a run folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def finished(self) -> Iterator[tuple[str, dict]]:
        """Names and metrics of what has been scored, sorted. Raises UserError for a damaged file."""
        for file in sorted(self.folder.glob("*/metrics.json")):
            if not file.parent.name.endswith(UNFINISHED):
                try:
                    yield file.parent.name, json.loads(file.read_text())
                except (OSError, json.JSONDecodeError) as error:
                    raise UserError(f"{file} is damaged ({error}): remove its folder to score it again") from error

    def metrics(self, name: str) -> dict:
        """The metrics of a source; {} if it has none yet."""
        return next((found for other, found in self.finished() if other == name), {})

    def repair(self) -> None:
        """Cleans up after a job that was killed while it replaced a folder. For rank 0, while it holds the lock."""
        for kept in self.folder.glob("*.old"):
            final = kept.with_suffix("")
            if final.exists():
                shutil.rmtree(kept, ignore_errors=True)
            else:
                os.replace(kept, final)
        for part in self.folder.glob("*.tmp"):
            shutil.rmtree(part, ignore_errors=True)

    def write(self, name: str, write: Callable[[Path], None]) -> Path:
        """A source's folder, by a function that fills it. Readers see the old one or the new one."""
        temporary = self.folder / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        replace_folder(temporary, self.folder / name)
        return self.folder / name

    @contextlib.contextmanager
    def claimed(self, world: World) -> Iterator[None]:
        """While a block runs, no other job writes here; this one waits for its turn. The lock dies with its process. Every rank
        must enter it; all raise UserError if the folder cannot be written."""
        lock, told = Lock(self.folder / LOCK), False
        while not _by_main(lock.attempt, world):
            if world.main and not told:
                told = True
                log.info(f"another job evaluates into {self.folder} ({lock.holder}): waiting for its current source")
            time.sleep(LOCK_SECONDS)
        try:
            _by_main(self.repair, world)
            yield
        finally:
            if world.main:
                lock.release()


def _by_main(call: Callable[[], Result], world: World) -> Result:
    """What a call by rank 0 returns, on every rank. If it fails, all raise UserError and none is left waiting for it."""
    result = problem = None
    if world.main:
        try:
            result = call()
        except (OSError, UserError) as error:
            problem = str(error)
    result, problem = from_main((result, problem), world)
    if problem:
        raise UserError(problem)
    return result
