"""Parts of the run state: what each rank saves of a stage besides its engines, and how it is redistributed."""

from collections import Counter
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from data.rejects import RETRIED
from data.sampling_order import BatchSplit
from models.conditioning import Conditioning
from models.ema import Ema
from trainer.checkpoint.reshard_state import redeal, reslice
from trainer.distributed.world import World, gather_objects
from trainer.engine.role import Role
from trainer.engine.save_weights import Snapshot


class StatePart(Protocol):
    """Something that a checkpoint holds for every rank."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        """This rank's state, from the states of all ranks of a run with another split or another sharding."""


class SampleCounts:
    """Counts this rank's skipped samples by reason, and its truncated captions; the metrics sum over ranks."""

    TRUNCATED = "truncated captions"  # their key in a checkpoint; those of earlier versions have none

    def __init__(self, world: World):
        self.world, self.skipped, self.truncated = world, Counter(), 0

    def by_reason(self) -> dict[str, int]:
        """The skipped samples of all ranks by reason, the most frequent first. Every rank must call it."""
        total = Counter()
        for counts in gather_objects(dict(self.skipped), self.world):
            total.update(counts)
        del total[RETRIED]
        return dict(total.most_common())

    def state_dict(self) -> dict:
        return {**self.skipped, self.TRUNCATED: self.truncated}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = Counter(state)
        self.truncated = self.skipped.pop(self.TRUNCATED, 0)

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        total = Counter()
        for state in states if self.world.main else ():
            total.update(state)
        return dict(total)


class RoleWatch:
    """What a trained role remembers for the metrics: skipped updates, gradient norm, weights at the last line."""

    def __init__(self, role: Role):
        self.role = role

    def state_dict(self) -> dict:
        return self.role.watch_state()

    def load_state_dict(self, state: dict) -> None:
        self.role.load_watch_state(state)

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        return states[0] | {"weights": None}  # they may be another rank's now: the next line has no update ratio


class WeightAverage:
    """The weight average (EMA) of a role: of the float32 master weights that this rank owns, updated without communication.
    It lies where the network's weights lie, also if the optimizer is offloaded."""

    def __init__(self, role: Role, decay: float, warmup: bool = False):
        """warmup: see Ema; `update` then needs the number of earlier updates."""
        self.role, self.ema = role, Ema(role.masters.local(), decay, role.local()[0].device, warmup)

    def update(self, earlier: int | None = None) -> None:
        self.ema.update(self.role.masters.local(), earlier)

    def applied(self) -> AbstractContextManager:
        """Within the block the network has the averaged weights. Every rank must enter it."""
        return self.role.averaged(self.ema.shadow)

    def snapshot(self) -> Snapshot | None:
        """The averaged weights of the whole network in float32, on rank 0. Every rank must call it."""
        return self.role.snapshot(self.ema.shadow, torch.float32)

    def state_dict(self) -> dict:
        return self.ema.state_dict() | {"ranges": self.role.masters.ranges()}

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state)

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        ranges = self.role.masters.ranges()
        flat = reslice([s["shadow"] for s in states], [s["ranges"] for s in states], ranges)
        shadow = [v.view(mine.shape) for v, mine in zip(flat, self.ema.shadow, strict=True)]
        return states[0] | {"shadow": shadow, "ranges": ranges}


class ReusedSamples:
    """The samples of the last generator update and their conditioning, one entry per micro-step, for fake-score updates
    that reuse them (`backtrack.reuse_x0`). The generator that made them has moved on, so a checkpoint holds them."""

    def __init__(self, world: World, split: BatchSplit, family: str):
        self.world, self.split, self.family = world, split, family
        self._entries: list[tuple[Tensor, Conditioning]] = []

    def clear(self) -> None:
        self._entries = []

    def append(self, x0: Tensor, cond: Conditioning) -> None:
        self._entries.append((x0, cond))

    def __getitem__(self, micro_step: int) -> tuple[Tensor, Conditioning]:
        return self._entries[micro_step]

    def state_dict(self) -> dict:
        return {"entries": [{"x0": x0, **cond.tensors()} for x0, cond in self._entries]}

    def load_state_dict(self, state: dict) -> None:
        entries = [{key: value.to(self.world.device) for key, value in entry.items()} for entry in state["entries"]]
        self._entries = [(entry.pop("x0"), Conditioning(**entry, family=self.family)) for entry in entries]

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        return {"entries": redeal([s["entries"] for s in states], saved, self.split, self.world.rank)}
