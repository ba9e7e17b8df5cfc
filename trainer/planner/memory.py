"""A role's memory and communication under DeepSpeed, as arithmetic of its ZeRO stage and the number of GPUs.

What each stage keeps was read in DeepSpeed 0.19, and the tests compare it with its real engines.
"""

from dataclasses import dataclass

from pydantic import BaseModel

from models.profile import NetworkMemory

MASTER, MOMENTS = 4, 8  # bytes per element: float32 weights, and Adam's two float32 moments


class Zero(BaseModel):
    """The part of `zero_optimization` in a DeepSpeed JSON that decides about memory; defaults are DeepSpeed's."""

    stage: int = 0
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    offload_optimizer: dict | None = None
    offload_param: dict | None = None

    @property
    def offloads_optimizer(self) -> bool:
        return (self.offload_optimizer or {}).get("device", "none") != "none"

    @property
    def offloads_parameters(self) -> bool:
        return self.stage == 3 and (self.offload_param or {}).get("device", "none") != "none"


@dataclass(frozen=True)
class PlannedRole:
    """One role on one of `ranks` GPUs; all sizes in bytes.

    width: bytes per element in the run's precision, 2 or 4. averaged: with an EMA. fp32_gradients:
    summed over ranks and micro-steps in float32, whatever the precision. A frozen role has parameters only.
    """

    network: NetworkMemory
    zero: Zero
    ranks: int
    width: int
    trained: bool
    averaged: bool = False
    fp32_gradients: bool = False

    @property
    def parameters(self) -> float:
        return 0 if self.zero.offloads_parameters else self._weights

    @property
    def gradients(self) -> float:
        """From the backward pass to the update; under ZeRO-3 all the time."""
        return 0 if self._offloads else self._sum_width * self._trainable / (self.ranks if self.zero.stage >= 2 else 1)

    @property
    def optimizer(self) -> float:
        return 0 if self._offloads else self._optimizer_width * self._owned

    @property
    def update(self) -> float:
        """When the optimizer steps: the float32 gradients that Adam reads, if the gradients are not float32 already. Stages 1
        and 2 first copy the gradients into one tensor, unless they are summed in another type, which keeps them in one."""
        if self._offloads:
            return 0
        copied = self.zero.stage in (1, 2) and self._sum_width == self.width
        return ((4 if self._sum_width == 2 else 0) + (self._sum_width if copied else 0)) * self._owned

    @property
    def ema(self) -> float:
        """The float32 average, which all ranks share at every ZeRO stage."""
        return 4 * self._trainable / self.ranks if self.averaged else 0

    @property
    def buckets(self) -> float:
        """While the role computes: gradients on their way to other ranks."""
        if not self.trained or not self.zero.stage or not (self.zero.contiguous_gradients or self.zero.stage == 3):
            return 0
        buffers = 2 if self.zero.overlap_comm and self.zero.stage < 3 else 1
        return buffers * self.zero.reduce_bucket_size * self._sum_width

    @property
    def gathered(self) -> float:
        """While the role computes: the weights that ZeRO-3 has gathered from other ranks."""
        if self.zero.stage < 3 or self.ranks == 1:
            return 0
        most = self.zero.stage3_max_live_parameters + self.zero.stage3_prefetch_bucket_size
        return self.width * (self._kept_whole + min(self.network.parameters - self._kept_whole, most))

    @property
    def host(self) -> float:
        """Host memory: offloaded weights; offloaded masters, moments, float32 gradients and a buffer for new weights."""
        weights = self._weights if self.zero.offloads_parameters else 0
        return weights + ((self._optimizer_width + 4 + self.width) * self._owned if self._offloads else 0)

    @property
    def state(self) -> float:
        """Parameters, gradients and optimizer state: what is commonly called model state."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def idle(self) -> float:
        """Held while another role computes."""
        return self.parameters + self.optimizer + self.ema + self.gradients - self.passing_gradients

    @property
    def passing_gradients(self) -> float:
        """Gradients that an update frees: all but ZeRO-3's, which stay."""
        return 0 if self.zero.stage == 3 else self.gradients

    @property
    def computing(self) -> float:
        """On top of `idle` while the role computes, without activations."""
        return self.passing_gradients + self.buckets + self.gathered

    @property
    def updating(self) -> float:
        """On top of `idle` while the role's optimizer steps."""
        return self.passing_gradients + self.update

    @property
    def checkpoint(self) -> float:
        """On disk, over all ranks: weights, optimizer state, EMA. ZeRO-3 writes trained weights in float32 only."""
        weights = self.width * (sum(self.network.frozen) if self.zero.stage == 3 else self.network.parameters)
        return weights + (self._optimizer_width + (4 if self.averaged else 0)) * self._trainable

    @property
    def forward_traffic(self) -> float:
        """Bytes sent for a forward pass without gradient: ZeRO-3 gathers the weights."""
        return self._ring * self.width * (self.network.parameters - self._kept_whole) if self.zero.stage == 3 else 0

    def update_traffic(self, gathers: float, micro_steps: int) -> float:
        """Bytes sent for one update of the role. gathers: passes per micro-step that gather weights under ZeRO-3.

        In units of the trained weights: an all-reduce sends 2, a reduce-scatter or an all-gather 1. Stage 0 all-reduces
        the gradients: 2. Stages 1 and 2 all-reduce them too, of which each rank keeps its part, and gather the new
        weights: stage 1 once, 3; stage 2 reduces in each of m micro-steps, 2 m + 1. Stage 3: per micro-step a
        reduce-scatter and an all-gather per pass, and per update the weights that stay whole.
        """
        gradients, weights = (self._ring * width * self._trainable for width in (self._sum_width, self.width))
        if self.zero.stage == 3:
            whole = self._ring * self.width * self._kept_whole
            return (gradients + gathers * self.forward_traffic) * micro_steps + whole
        reductions = micro_steps if self.zero.stage == 2 else 1
        return 2 * reductions * gradients + (weights if self.zero.stage else 0)

    @property
    def _kept_whole(self) -> int:
        """Elements that ZeRO-3 does not gather at every pass, since their parameters are small."""
        sizes, most = self.network.trainable + self.network.frozen, self.zero.stage3_param_persistence_threshold
        return sum(n for n in sizes if n <= most)

    @property
    def _sum_width(self) -> int:
        """Bytes per element of the gradients' sums."""
        return 4 if self.fp32_gradients else self.width

    @property
    def _trainable(self) -> int:
        return sum(self.network.trainable) if self.trained else 0

    @property
    def _owned(self) -> float:
        """Trained elements whose optimizer state is this rank's: stages 1 to 3 share it."""
        return self._trainable / (self.ranks if self.zero.stage else 1)

    @property
    def _optimizer_width(self) -> int:
        """Bytes per element. Only stage 0 in float32 keeps no master weights."""
        return MOMENTS + (MASTER if self.width == 2 or self.zero.stage else 0)

    @property
    def _weights(self) -> float:
        return self.width * self.network.parameters / (self.ranks if self.zero.stage == 3 else 1)

    @property
    def _offloads(self) -> bool:
        return self.trained and self.zero.offloads_optimizer

    @property
    def _ring(self) -> float:
        """Share of a volume that each rank sends in a ring collective."""
        return (self.ranks - 1) / self.ranks
