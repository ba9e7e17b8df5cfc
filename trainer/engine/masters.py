"""Float32 master weights of trained roles: which elements a rank owns, and whole networks made from all ranks' values.

bfloat16 weights keep 8 bits: at a learning rate of 5e-7 most updates do not move them at all. What is averaged, evaluated or
exported is therefore made from the master weights, never from the copies that the network computes with.
"""

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from trainer.distributed.world import World
from trainer.engine.deepspeed_internals import MASTER, live_pieces, swaps_to_nvme
from trainer.engine.weight_slices import Slice, Weights
from trainer.errors import UserError


class UnevenSlice(Slice):
    """The part of one parameter whose master weights are this rank's at ZeRO-1/2, which cuts one flat tensor of all
    parameters into equal parts: ranks own whole parameters, parts of one or two, and nothing of most.

    whole: the parameter's equal slice. cuts: the elements [start, end) of each rank.
    """

    def __init__(self, whole: Slice, cuts: tuple[tuple[int, int], ...], world: World):
        self.key, self.parameter, self.shape, self.numel = whole.key, whole.parameter, whole.shape, whole.numel
        self.sharded = False
        self.start, self.end = cuts[world.rank]
        self.owners = [(rank, start, end) for rank, (start, end) in enumerate(cuts) if start < end]

    def write(self, value: Tensor) -> None:
        self.parameter.data.copy_(self._whole(value, self.parameter.dtype))

    def gather(self, value: Tensor, dtype: torch.dtype, world: World) -> Tensor | None:
        whole = self._whole(value, dtype)
        return whole.cpu() if world.main else None

    def _whole(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The whole parameter, assembled from every rank's `value`, on every rank."""
        whole = torch.empty(self.numel, dtype=dtype, device=self.parameter.device)
        whole[self.start : self.end].copy_(value)
        for rank, start, end in self.owners:
            dist.broadcast(whole[start:end], src=rank)
        return whole.view(self.shape)


class Masters:
    """The float32 master weights of a trained role. Every rank must make it.

    layout: the weights, in slices of which this rank owns the master weights: at ZeRO-0, where every rank has all of them,
    and at ZeRO-3 the slices of `weights`, at ZeRO-1/2 the optimizer's. `layout.write` and `layout.gather` take values in
    this layout, such as an average of `local`.
    """

    def __init__(self, name: str, weights: Weights, engine: DeepSpeedEngine):
        self.name, self.engine = name, engine
        self._trained = {key: p for key, p in engine.module.named_parameters() if p.requires_grad}
        self.layout = weights
        if engine.zero_optimization_stage() in (1, 2) and weights.world.size > 1:
            held = {
                id(self._trained[piece.name]): (piece.start, piece.end) for piece in live_pieces(engine, self._trained)
            }
            mine = [held.get(id(s.parameter), (0, 0)) for s in weights.slices]
            cuts: list[list[tuple[int, int]]] = [mine] * weights.world.size
            dist.all_gather_object(cuts, mine)
            pairs = zip(weights.slices, zip(*cuts, strict=True), strict=True)
            self.layout = weights.with_slices([UnevenSlice(s, parts, weights.world) for s, parts in pairs])

    def local(self) -> list[Tensor]:
        """This rank's master weights, flat, one tensor per weight: live, where the optimizer keeps them. Raises UserError
        if it swaps them to NVMe."""
        if swaps_to_nvme(self.engine):
            raise UserError(
                f"{self.name}: an average of its weights is made from the optimizer's master weights, which cannot be read "
                "from NVMe: set offload_optimizer.device to cpu in its DeepSpeed configuration"
            )
        pieces = {id(self._trained[piece.name]): piece for piece in live_pieces(self.engine, self._trained)}
        out = []
        for s in self.layout.slices:
            if piece := pieces.get(id(s.parameter)):
                out.append(piece.values[MASTER][s.start - piece.start : s.end - piece.start])
            else:
                out.append(torch.empty(0, dtype=torch.float32, device=s.parameter.device))
        return out

    def ranges(self) -> list[tuple[int, int]]:
        """The elements [start, end), counted flat, of each weight that `local` returns."""
        return [(s.start, s.end) for s in self.layout.slices]
