"""The teacher's engine as the walk's target: nodes are loaded into it in place, read ahead by a background thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from trainer.engines import Role
from trainer.path import DegradationPath
from trainer.telemetry import log
from trainer.walk import WalkSettings, fixed_switches, moves_on, target
from trainer.weights import read_folder


class Target:
    """Which node the teacher's engine holds, and the walk's recorded decisions.

    path: None keeps the teacher as the target for ever.
    """

    def __init__(self, teacher: Role, path: DegradationPath | None, settings: WalkSettings):
        self.teacher, self.path, self.settings = teacher, path, settings
        self.nodes = len(path.nodes) if path else 0
        fixed = path is not None and settings.mode == "fixed"
        self.switches = fixed_switches(self.nodes, settings.interval) if fixed else []
        self.node = 0  # what the engine holds: it starts as the teacher
        # Adaptive walk: mismatch of the first interval on this node, and the running sum of the present one.
        self.first: float | None = None
        self.sum: Tensor | float = 0.0
        self.count = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="node-reader")
        self._ahead: tuple[int, Future] | None = None

    def wanted(self, update: int) -> int:
        """The node that is the target at a generator update."""
        return target(update, self.nodes, self.switches) if self.path else 0

    def move(self, update: int) -> bool:
        """Makes the engine hold the node of this update; True if it changed."""
        node = self.wanted(update)
        if node == self.node:
            return False
        folder = self.path.folder(node)
        ahead = self._ahead and self._ahead[0] == node
        values = self._ahead[1].result() if ahead else self._read(node)
        self.teacher.write(values)
        self.node, self._ahead = node, None
        log.info(f"generator update {update}: target is node {node} ({len(values)} tensors from {folder})")
        if node > 0:
            self._ahead = node - 1, self._reader.submit(self._read, node - 1)
        return True

    def _read(self, node: int) -> list[Tensor]:
        """This rank's slices of a node. An adapter of zeros is the teacher itself: its node 0 is not read."""
        if node == 0 and self.teacher.adapter:
            return [torch.zeros_like(weights, device="cpu") for weights in self.teacher.local()]
        return read_folder(self.teacher.slices, self.path.folder(node))

    def observe(self, update: int, mismatch: Tensor, mean: Callable[[Tensor], float]) -> None:
        """Adaptive walk: takes the mismatch of this update and, once an interval, decides (this reads the device)."""
        if self.path is None or self.settings.mode == "fixed" or self.node == 0:
            return
        self.sum, self.count = self.sum + mismatch.detach().double(), self.count + 1
        if self.count < self.settings.interval:
            return
        value = mean(self.sum / self.count)
        self.sum, self.count = 0.0, 0
        if self.first is None:
            self.first = value
        last = self.switches[-1] if self.switches else 0
        if moves_on(self.settings, update + 1, last, self.first, value):
            self.switches.append(update + 1)
            self.first = None

    def state_dict(self) -> dict:
        return {"switches": self.switches, "first": self.first, "sum": self.sum, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.switches, self.first = list(state["switches"]), state["first"]
        self.sum, self.count = state["sum"], state["count"]

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
