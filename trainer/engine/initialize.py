"""Starts a network's DeepSpeed engine, and changes in it what would cost time or break."""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn


def initialize(network: nn.Module, optimizer: torch.optim.Optimizer | None, config: dict) -> DeepSpeedEngine:
    """The network as an engine; without an optimizer it only runs forward passes."""
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    # DeepSpeed copies two scripts into every checkpoint; on a full disk rank 0 would raise alone, before a barrier.
    engine._copy_recovery_script = lambda folder: None
    if engine.zero_optimization_stage() == 0 and optimizer:
        if engine.bfloat16_enabled():
            _update_on_device(engine.optimizer)
        if dist.get_world_size() == 1:
            # DeepSpeed would copy every gradient into a buffer and back: a quarter of a step at 35 M weights.
            engine.enable_backward_allreduce = False
    return engine


def _update_on_device(optimizer: FP16_UnfusedOptimizer) -> None:
    """Has DeepSpeed's optimizer of bf16 weights at ZeRO-0 update them in few kernels, and never read the device, where its
    own update reads one value per parameter.

    The arithmetic stays: gradients in float32, clipped by their norm, update the masters, which are copied to the network.
    The check for NaN and infinity is left to the optimizer inside, GuardedAdamW.
    """
    masters = [p for group in optimizer.fp32_groups for p in group]
    weights = [p for group in optimizer.fp16_groups for p in group]
    # DeepSpeed has already made one update, without gradients: Adam would correct its moments for a step too many.
    optimizer.optimizer.state.clear()
    optimizer.refresh_fp32_params()

    @torch.no_grad()
    def step(closure: None = None) -> None:
        gradients = []
        for master, p in zip(masters, weights, strict=True):
            if p.grad is None:  # unused in this update: its moments and its decay go on, as in DeepSpeed
                p.grad = torch.zeros_like(p)
            master.grad = torch.empty_like(master)
            gradients.append(master.grad)
        torch._foreach_copy_(gradients, [p.grad for p in weights])
        norm = torch.nn.utils.get_total_norm(gradients)
        if optimizer.clip_grad > 0:
            torch.nn.utils.clip_grads_with_norm_(masters, optimizer.clip_grad, norm)
        optimizer._global_grad_norm = norm
        optimizer.optimizer.step()
        torch._foreach_copy_(weights, masters)
        for master in masters:
            master.grad = None

    optimizer.step = step
