"""The samples of the last generator update, for fake-score updates that reuse them (`backtrack.reuse_x0`)."""

from torch import Tensor

from data.sampling_order import BatchSplit
from models.conditioning import Conditioning
from trainer.checkpoint.reshard_state import redeal
from trainer.distributed.world import World


class ReusedSamples:
    """One micro-batch of samples and their conditioning per micro-step; part of the run state, since the generator that
    made them has moved on."""

    def __init__(self, world: World, split: BatchSplit, family: str):
        self.world, self.split, self.family = world, split, family
        self._parts: list[tuple[Tensor, Conditioning]] = []

    def clear(self) -> None:
        self._parts = []

    def append(self, x0: Tensor, cond: Conditioning) -> None:
        self._parts.append((x0, cond))

    def __getitem__(self, part: int) -> tuple[Tensor, Conditioning]:
        return self._parts[part]

    def state_dict(self) -> dict:
        return {"parts": [{"x0": x0, **cond.tensors()} for x0, cond in self._parts]}

    def load_state_dict(self, state: dict) -> None:
        parts = [{key: value.to(self.world.device) for key, value in part.items()} for part in state["parts"]]
        self._parts = [(part.pop("x0"), Conditioning(**part, family=self.family)) for part in parts]

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        """The rows of this rank in the new split."""
        return {"parts": redeal([s["parts"] for s in states], saved, self.split, self.world.rank)}
