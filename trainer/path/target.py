"""Which node of the path is the target, and loading it into the teacher's engine in place, read ahead by a thread."""

from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from data.sampling_order import BatchSplit
from models.errors import ModelError
from trainer.config.schema import WalkSettings
from trainer.distributed.logs import log
from trainer.distributed.world import first_problem, mean_over_ranks
from trainer.engine.role import Role
from trainer.engine.weight_slices import Weights
from trainer.errors import UserError
from trainer.path.manifest import DegradationPath


def fixed_switches(nodes: int, interval: int) -> list[int]:
    """The generator updates at which the target of a path with `nodes` nodes (node 0 included) moves on."""
    return [interval * k for k in range(1, nodes - 1)]


def target_node(update: int, nodes: int, switches: list[int]) -> int:
    """The index of the target node at a generator update (from 0): a pure function of the switches.

    It starts at node N-1 = nodes - 2 (the fake score starts from node N), moves one node nearer to the teacher at each
    switch, ends at node 0, the teacher, and stays there (DisBack, algorithm 2).
    """
    return max(nodes - 2 - bisect_right(sorted(switches), update), 0)


def moves_on(settings: WalkSettings, update: int, last_switch: int, first_mismatch: float, mismatch: float) -> bool:
    """Whether an adaptive walk moves on before this update; the decision is recorded in the run state."""
    stayed = update - last_switch
    if stayed < settings.interval:
        return False
    return stayed >= settings.most or mismatch < settings.share * first_mismatch


class ReadAhead:
    """Reads this rank's slices of weights folders in a background thread, into one host buffer in the live dtype (pinned
    on a GPU). At most one folder is in memory, and a switch only has to copy it to the device."""

    def __init__(self, weights: Weights, device: torch.device):
        self.weights, self.pinned = weights, device.type == "cuda"
        # A new thread's device is the first GPU, and pinning there would open a context on it.
        begin = (torch.cuda.set_device, (device,)) if self.pinned else (None, ())
        self._thread = ThreadPoolExecutor(1, "node-reader", *begin)
        self._buffers: list[Tensor] | None = None
        self._copied: torch.cuda.Event | None = None  # recorded after the last copies from the buffer to the device
        self._ahead: tuple[Path | None, Future] | None = None

    def _read(self, folder: Path | None) -> list[Tensor]:
        if self._buffers is None:
            self._buffers = self.weights.host_buffers(self.pinned)
        if self._copied is not None:
            self._copied.synchronize()
        if folder is None:
            return [buffer.zero_() for buffer in self._buffers]
        return self.weights.read(folder, self._buffers)

    def begin(self, folder: Path | None) -> None:
        """Starts to read a folder; None reads as zeros, the teacher's own adapter. The values taken before must have been
        written (`written`)."""
        self._ahead = folder, self._thread.submit(self._read, folder)

    def take(self, folder: Path | None) -> list[Tensor]:
        """The folder's slices, read ahead or now; valid until the next `begin`. Raises ModelError."""
        if self._ahead is None or self._ahead[0] != folder:
            self.begin(folder)  # queued behind what the thread is still reading
        future, self._ahead = self._ahead[1], None
        return future.result()

    def written(self) -> None:
        """The buffer may be filled again once the device has finished the work submitted so far."""
        if self.pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def release(self) -> None:
        """Frees the buffer, after the last folder."""

        def free() -> None:
            if self._copied is not None:
                self._copied.synchronize()
            self._buffers = None

        self._thread.submit(free)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class Target:
    """The target node: what the teacher's engine holds, and the walk's recorded decisions (part of the run state).

    path: None keeps the teacher as the target.
    """

    def __init__(self, teacher: Role, path: DegradationPath | None, settings: WalkSettings):
        self.teacher, self.path, self.settings = teacher, path, settings
        self.nodes = len(path.nodes) if path else 0
        fixed = path is not None and settings.mode == "fixed"
        self.switches = fixed_switches(self.nodes, settings.interval) if fixed else []
        self.node = 0  # the engine starts as the teacher
        # Adaptive walk: mismatch of the first interval on this node, and the running sum of the present interval.
        self.first_mismatch: float | None = None
        self.mismatch_sum: Tensor | float = 0.0
        self.mismatches = 0
        self._reader = ReadAhead(teacher.weights, teacher.world.device)

    def wanted(self, update: int) -> int:
        """The node that is the target at a generator update."""
        return target_node(update, self.nodes, self.switches) if self.path else 0

    def switches_at(self, update: int) -> bool:
        """Whether a walk starts or moves on at a generator update."""
        return self.path is not None and (update == 0 or self.wanted(update) != self.wanted(update - 1))

    def move(self, update: int) -> None:
        """Makes the engine hold the target node of a generator update. Every rank must call it. Raises UserError on all
        of them if one cannot read the node."""
        node = self.wanted(update)
        if node == self.node:
            return
        values = problem = None
        try:
            values = self._reader.take(self._folder(node))
        except ModelError as error:
            problem = f"target node {node} cannot be loaded at generator update {update}: {error}"
        # All ranks write or none: where ranks assemble parameters together, they would wait for one that gave up.
        if problem := first_problem(problem, self.teacher.world):
            raise UserError(problem)
        self.teacher.weights.write(values)
        self._reader.written()
        self.node = node
        log.info(
            f"generator update {update}: target is node {node} ({len(values)} tensors from {self.path.folder(node)})"
        )
        if node > 0:
            self._reader.begin(self._folder(node - 1))
        else:
            self._reader.release()

    def _folder(self, node: int) -> Path | None:
        """The folder to read for a node. None for the node 0 of LoRA nodes: an adapter of zeros is the teacher itself."""
        return None if node == 0 and self.teacher.adapter else self.path.folder(node)

    def observe(self, update: int, mismatch: Tensor) -> None:
        """Adaptive walk: adds the mismatch of this update and decides once per interval, which reads the device."""
        if self.path is None or self.settings.mode == "fixed" or self.node == 0:
            return
        self.mismatch_sum, self.mismatches = self.mismatch_sum + mismatch.detach().double(), self.mismatches + 1
        if self.mismatches < self.settings.interval:
            return
        value = float(mean_over_ranks(self.mismatch_sum / self.mismatches, self.teacher.world))
        self.mismatch_sum, self.mismatches = 0.0, 0
        if self.first_mismatch is None:
            self.first_mismatch = value
        last = self.switches[-1] if self.switches else 0
        if moves_on(self.settings, update + 1, last, self.first_mismatch, value):
            self.switches.append(update + 1)
            self.first_mismatch = None

    def state_dict(self) -> dict:
        return {
            "switches": self.switches,
            "first": self.first_mismatch,
            "sum": self.mismatch_sum,
            "count": self.mismatches,
        }

    def load_state_dict(self, state: dict) -> None:
        self.switches, self.first_mismatch = list(state["switches"]), state["first"]
        self.mismatch_sum, self.mismatches = state["sum"], state["count"]

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        """States of all ranks differ only in the running sum of a rank's own mismatches, whose mean decides."""
        return states[0] | {"sum": sum(state["sum"] for state in states) / len(states)}

    def close(self) -> None:
        self._reader.close()
