"""Stopping on a signal, at the same step on every rank, without device synchronisation."""

import signal

import torch
import torch.distributed as dist

from data.loader import STOP_SIGNALS
from trainer.distributed.stop_flag import note_stop
from trainer.distributed.world import World


class StopRequest:
    """Catches SIGTERM, SIGUSR1 and Ctrl-C while active; after each step, `agreed()` says whether any rank has received one.

    The ranks agree by an asynchronous all-reduce between the hosts (gloo, four bytes), started after one step and read after
    the next. It takes no time from the step, and all ranks stop at the same step.
    """

    def __init__(self, world: World):
        self.received = 0  # the signal's number
        self.world = world
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._handlers: dict[int, object] = {}  # to restore

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pending:
            self._pending[0].wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the save
        self.received = number
        note_stop()

    def agreed(self) -> bool:
        """Whether to save and stop now. Every rank calls it once per step and gets the same answer."""
        if self.group is None:
            return bool(self.received)
        answer = False
        if self._pending:
            work, flag = self._pending
            work.wait()
            answer = bool(flag.item())  # in host memory: no device synchronisation
        flag = torch.tensor([int(bool(self.received))], dtype=torch.int32)
        self._pending = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return answer
