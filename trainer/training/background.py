"""Calls that run one after the other in a thread, beside training."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue

Call = tuple[Future, Callable, tuple]


class Background:
    """A thread for calls, in order. Python's own pools would keep the process alive for a call that never returns."""

    def __init__(self) -> None:
        self.calls: deque[Call] = deque()  # that have not ended, or failed
        self._start()

    def _start(self) -> None:
        self._queue: SimpleQueue[Call | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._queue,), daemon=True, name="background").start()

    def submit(self, call: Callable, *args: object) -> None:
        while self.calls and self.calls[0][0].done() and not self.calls[0][0].exception():
            self.calls.popleft()
        self.calls.append((Future(), call, args))
        self._queue.put(self.calls[-1])

    def join(self, seconds: float) -> bool:
        """Waits for all calls; False once it has waited for one of them for `seconds`. Raises what a call raised."""
        while self.calls:
            future = self.calls[0][0]
            if wait([future], seconds).not_done:
                return False
            self.calls.popleft()
            future.result()
        return True

    def abandon(self) -> None:
        """Leaves the call that lasts, and its thread, to themselves; another thread goes on with the next one."""
        _, *later = self.calls
        self.calls.clear()
        # If the thread ever goes on, it skips what was cancelled; what it has begun meanwhile is not done again.
        later = [(call, args) for future, call, args in later if future.cancel()]
        self._start()
        for call, args in later:
            self.submit(call, *args)

    def close(self) -> None:
        self._queue.put(None)


def _work(queue: SimpleQueue) -> None:
    while task := queue.get():
        future, call, args = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(call(*args))
        except BaseException as error:  # raised by `join`
            future.set_exception(error)
