"""Stopping on a signal at a step that all ranks agree on, without waiting for the device."""

import signal

import torch
import torch.distributed as dist

from trainer.distributed.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Catches SIGTERM, SIGUSR1 and Ctrl-C while active; `agreed()` tells after each step whether any rank was asked.

    The flag travels by an asynchronous all-reduce between the hosts (gloo, four bytes): begun after one step and read
    after the next, so that it costs no time and no device synchronisation, and all ranks stop at the same step.
    """

    def __init__(self, world: World):
        self.asked = 0
        self.world = world
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pending:
            self._pending[0].wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for a save
        self.asked = number

    def agreed(self) -> bool:
        """Whether to save and stop now. Every rank calls it once a step and gets the same answer."""
        if self.group is None:
            return bool(self.asked)
        answer = False
        if self._pending:
            work, flag = self._pending
            work.wait()
            answer = bool(flag.item())  # host memory: no device is waited for
        flag = torch.tensor([int(bool(self.asked))], dtype=torch.int32)
        self._pending = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return answer
