"""Work on many items, over several processes of one machine."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process
from threading import Thread

PROGRESS_SECONDS = 10.0  # between progress lines


def in_processes(action: Callable, items: Sequence, processes: int) -> Iterator:
    """The results of an action on each item, in order, from several processes; from this one if `processes` is 1."""
    if processes <= 1:
        yield from map(action, items)
        return
    with ProcessPoolExecutor(processes, get_context("fork"), initializer=_begin) as pool:
        yield from pool.map(action, items)


def _begin() -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process if its parent was killed: it would otherwise write files that a second attempt writes as well."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


class Progress:
    """Lines about the progress of long work, with the time remaining."""

    def __init__(self, what: str, total: int, say: Callable[[str], None] = print):
        self.what, self.total, self.say, self.done = what, total, say, 0
        self.began = self.said = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said >= PROGRESS_SECONDS:
            self.said, rate = now, self.done / (now - self.began)
            left = (self.total - self.done) / rate
            self.say(f"{self.what}: {self.done} of {self.total}, {rate:.0f} per second, {left:.0f} s left")
