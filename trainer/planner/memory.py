"""Bytes and communication of a role under DeepSpeed, as pure arithmetic of its ZeRO stage and the number of processes.

What each stage keeps was read in DeepSpeed 0.19 and is compared with its real engines in the tests.
"""

from dataclasses import dataclass

from models.profile import Cost

GB = 1e9
MASTER, MOMENTS = 4, 8  # bytes an element: float32 weights, and Adam's two float32 moments


@dataclass(frozen=True)
class Zero:
    """The part of a DeepSpeed JSON that decides about memory; defaults are DeepSpeed's."""

    stage: int
    reduce_bucket: int
    double_buffer: bool
    contiguous: bool
    prefetch: int
    persistence: int
    max_live: int
    offload_optimizer: bool
    offload_parameters: bool

    @classmethod
    def of(cls, config: dict) -> "Zero":
        """From a DeepSpeed configuration, whose numbers may be written as 2e8."""
        z = config.get("zero_optimization", {})
        stage = z.get("stage", 0)

        def offloaded(what: str) -> bool:
            return (z.get(what) or {}).get("device", "none") != "none"

        return cls(
            stage,
            int(z.get("reduce_bucket_size", 5e8)),
            z.get("overlap_comm", stage == 3) and stage < 3,
            z.get("contiguous_gradients", True),
            int(z.get("stage3_prefetch_bucket_size", 5e7)),
            int(z.get("stage3_param_persistence_threshold", 1e5)),
            int(z.get("stage3_max_live_parameters", 1e9)),
            offloaded("offload_optimizer"),
            offloaded("offload_param"),
        )


@dataclass(frozen=True)
class RoleBytes:
    """Bytes a GPU. Held all the time: parameters, optimizer, ema, persistent gradients or buffers. gradients: from the
    backward pass to the update (always, under stage 3). buckets, gathered: while the role computes. update: float32
    gradients of this rank's part while the optimizer steps. host: of pinned or plain host memory."""

    parameters: float = 0
    gradients: float = 0
    optimizer: float = 0
    ema: float = 0
    buckets: float = 0
    gathered: float = 0
    update: float = 0
    host: float = 0
    gradients_stay: bool = False

    @property
    def state(self) -> float:
        """Parameters, gradients and optimizer state: what is commonly called model state."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def idle(self) -> float:
        """While another role computes."""
        return self.parameters + self.optimizer + self.ema + (self.gradients if self.gradients_stay else 0)

    @property
    def busy(self) -> float:
        """While this role computes, activations not counted."""
        return self.parameters + self.optimizer + self.ema + self.gradients + self.buckets + self.gathered


def partition(elements: int, ranks: int) -> list[tuple[int, int]]:
    """The flat [start, end) of a parameter that each rank owns under ZeRO-3: equal pieces, the last one short."""
    piece = -(-elements // ranks)
    return [(min(rank * piece, elements), min((rank + 1) * piece, elements)) for rank in range(ranks)]


def role_bytes(cost: Cost, zero: Zero, ranks: int, width: int, trained: bool, ema: bool = False) -> RoleBytes:
    """Memory of one role on one of `ranks` GPUs. width: bytes an element of the run's precision (2 or 4).

    Below stage 3 parameters are whole; gradients are whole at stages 0 and 1; stages 1 to 3 share the optimizer state.
    A frozen role has parameters only. In a float32 run only stage 0 keeps no master weights.
    """
    trainable, frozen = (sum(cost.trainable), sum(cost.frozen)) if trained else (0, cost.parameters)
    sharded = zero.stage == 3
    share = ranks if sharded else 1
    parameters = width * (trainable + frozen) / share
    out = {"parameters": parameters, "ema": 4 * sum(cost.trainable) / ranks if ema else 0}
    if sharded:
        small = sum(n for n in cost.trainable + cost.frozen if n <= zero.persistence) if ranks > 1 else 0
        rest = cost.parameters - small
        gathered = small + min(rest, zero.max_live + zero.prefetch) if ranks > 1 else 0
        out["gathered"] = width * gathered
    if zero.offload_parameters and sharded:
        out |= {"parameters": 0, "host": parameters}
    if not trained:
        return RoleBytes(**out)
    owned = trainable / (ranks if zero.stage else 1)
    masters = MASTER if width == 2 or zero.stage else 0
    optimizer = (masters + MOMENTS) * owned
    gradients = width * trainable / (ranks if zero.stage >= 2 else 1)
    # The float32 copy of the gradient that Adam reads; a float32 run has it already.
    update = 4 * owned if width == 2 else 0
    bucket = zero.reduce_bucket * width * (2 if zero.double_buffer else 1)
    out["buckets"] = bucket if zero.stage and (zero.contiguous or sharded) else 0
    if zero.offload_optimizer:
        # Masters, moments, float32 gradients and a buffer for the new weights live in host memory; the update is there.
        host = out.get("host", 0) + optimizer + (4 + width) * owned
        out |= {"host": host, "optimizer": 0, "gradients": 0, "update": 0}
        return RoleBytes(**out)
    stay = zero.stage == 3
    return RoleBytes(**out, gradients=gradients, optimizer=optimizer, update=update, gradients_stay=stay)


def checkpoint_bytes(cost: Cost, zero: Zero, width: int, ema: bool) -> float:
    """Of a role in a checkpoint, over all ranks: weights, optimizer state, EMA. Under stage 3 DeepSpeed writes the
    float32 weights only."""
    trainable = sum(cost.trainable)
    weights = width * (sum(cost.frozen) if zero.stage == 3 else cost.parameters)
    masters = MASTER if width == 2 or zero.stage else 0
    return weights + (masters + MOMENTS) * trainable + (4 * trainable if ema else 0)


def update_traffic(cost: Cost, zero: Zero, ranks: int, width: int, passes: int, micro_steps: int) -> float:
    """Bytes that one GPU sends for one update of a trained role (ring collectives send (N - 1) / N of the volume).

    passes: forward and backward passes in a micro-step, each of which gathers the parameters under ZeRO-3.
    Stage 0: an all-reduce a update. 1: the same volume, as reduce-scatter and all-gather of updated weights. 2: a
    reduce-scatter every micro-step. 3: that, and an all-gather every pass.
    """
    ring = (ranks - 1) / ranks
    gradients, weights = width * sum(cost.trainable), width * cost.parameters
    if zero.stage < 2:
        return 2 * ring * gradients
    if zero.stage == 2:
        return ring * gradients * (micro_steps + 1)
    return ring * (gradients * micro_steps + weights * passes * micro_steps)


def forward_traffic(cost: Cost, zero: Zero, ranks: int, width: int) -> float:
    """Bytes that one GPU sends for a forward pass without gradient: an all-gather under ZeRO-3."""
    return (ranks - 1) / ranks * width * cost.parameters if zero.stage == 3 else 0.0
