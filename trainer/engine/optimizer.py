"""AdamW that skips updates whose gradient is not finite, and the learning-rate schedule."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config.schema import OptimizerSettings
from trainer.distributed.world import World


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that skips an update, on all ranks alike, if any rank's gradient has a NaN or an infinity.

    Otherwise one bad sample would put NaN into weights and moments, and the run would be lost. The decision stays on the
    device: the fused kernel takes it as a flag, so that the host does not wait. (DeepSpeed checks in some stages and
    precisions only.) skipped: the number of skipped updates, a scalar on the device.
    """

    def __init__(self, parameters: list[nn.Parameter], settings: OptimizerSettings, world: World):
        super().__init__(
            parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.world = world
        self.skipped = torch.zeros((), device=world.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        bad = (~torch.isfinite(torch.nn.utils.get_total_norm(gradients))).float().to(self.world.device)
        if self.world.size > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        # Offloaded states are updated on the CPU, whose kernel would not wait for a flag that is still being computed.
        self.found_inf: Tensor = bad.to(gradients[0].device)
        self.skipped += bad
        super().step(closure)


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Learning rate of the update at `step` (from 0) of `steps`: linear warm-up, then constant or cosine decay."""
    rate = settings.lr
    if step < settings.warmup:
        rate *= (step + 1) / settings.warmup
    if settings.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    return rate
