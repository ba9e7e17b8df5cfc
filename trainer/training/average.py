"""The weight average (EMA) of a role: sharded over the ranks, part of the run state."""

from contextlib import AbstractContextManager

from data.sampling_order import BatchSplit
from models.ema import Ema
from trainer.checkpoint.reshard_state import reslice
from trainer.engine.role import Role


class WeightAverage:
    """Averages the slices of a role's weights that this rank owns, in float32, without communication."""

    def __init__(self, role: Role, decay: float):
        self.role, self.ema = role, Ema(role.local(), decay)

    def update(self) -> None:
        self.ema.update(self.role.local())

    def applied(self) -> AbstractContextManager:
        """Within the block the network has the averaged weights. Every rank must enter it."""
        return self.role.averaged(self.ema)

    def state_dict(self) -> dict:
        """The average, and which elements of each weight this rank has."""
        return self.ema.state_dict() | {"ranges": self.role.ranges()}

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state)

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        """This rank's state, from those of all ranks of a run with another sharding."""
        ranges = self.role.ranges()
        flat = reslice([s["shadow"] for s in states], [s["ranges"] for s in states], ranges)
        shadow = [v.view(mine.shape) for v, mine in zip(flat, self.ema.shadow, strict=True)]
        return states[0] | {"shadow": shadow, "ranges": ranges}
