"""A scenario of tests/ranks.py: bytes that collectives send, as they are executed, and as `disback plan` counts them."""

import json
from contextlib import contextmanager

import support
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.architecture import find_architecture
from models.miniature import build_miniature
from models.profile import inputs, network_memory
from models.settings import MiniatureSettings
from trainer.backtrack import Backtracking
from trainer.config.deepspeed import deepspeed_config
from trainer.config.schema import OptimizerSettings
from trainer.engine.role import Role
from trainer.planner.memory import PlannedRole, Zero
from trainer.planner.stages import BacktrackPlan

# What a ring sends per byte of the larger tensor, in units of (N - 1) / N.
RING = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "broadcast_": 1, "reduce_": 1}
EACH_PASS = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


class Collectives(TorchDispatchMode):
    """Adds up what the collectives in the block send. Refuses kinds that it does not know."""

    def __init__(self, ranks):
        super().__init__()
        self.share, self.bytes = (ranks - 1) / ranks, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and function._opname != "barrier":
            size = sum(t.nbytes for t in args[0]) if isinstance(args[0], list) else max(t.nbytes for t in args[:2])
            self.bytes += RING[function._opname] * self.share * size
        return function(*args, **(kwargs or {}))


def traffic(root, world):
    """Updates of single roles at each ZeRO stage, and cycles of backtracking; {label: [executed, planned]} goes to
    root/traffic/."""
    found = {}

    @contextmanager
    def counted(label, planned, times=1):
        with Collectives(world.size) as collectives:
            yield
        found[label] = [collectives.bytes / times, planned]

    folder, steps = root / "traffic", 2
    unet = build_miniature(MiniatureSettings(**support.SMALLEST)).unet
    for stage, precision, fp32 in [*((s, "fp32", False) for s in range(4)), (1, "bf16", False), (2, "bf16", True)]:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 100, **EACH_PASS}
        file = support.zero3_config(folder / f"zero{stage}.json", zero_optimization=zero)
        config = deepspeed_config(file, 2, steps, 1.0, precision, world.size, fp32)
        role = Role("generator", type(unet).from_config(unet.config), config, world, OptimizerSettings(lr=1e-4))
        args, kwargs = inputs(role.module, 2, (4, 8, 8), 16)
        dtype, width = (torch.bfloat16, 2) if precision == "bf16" else (torch.float32, 4)
        network = network_memory({**unet.config, "_class_name": type(unet).__name__}, (4, 8, 8), 16, dtype)
        planned = PlannedRole(network, Zero(**zero), world.size, width, trained=True, fp32_gradients=fp32)

        def update(role=role, args=args, kwargs=kwargs):
            for _ in range(steps):
                role.step(role(*args, **kwargs)[0].float().square().mean(), 1e-4)

        update()
        with counted(f"zero{stage} {precision} {fp32}", planned.update_traffic(2, steps)):
            update()
    each = {"stage": 3, "stage3_param_persistence_threshold": 0, **EACH_PASS}
    each = support.zero3_config(folder / "each.json", zero_optimization=each)
    cycles = {"plain": ("zero2", ("backtrack.accumulation=2",)), "gan": (each, support.GAN)}
    for label, (stage, flags) in cycles.items():
        options = ("backtrack.path=none", "backtrack.fake_updates=2", "backtrack.steps=4", *support.zero(stage))
        run = support.single(root, "traffic", world, *options, *flags)
        plan = BacktrackPlan(run.settings, find_architecture(str(run.pipeline_folder)), world.size)
        training = Backtracking(run)
        training.begin(0)
        for step in (0, 1):
            training.update(step)
        with counted(label, plan.traffic, times=2):
            for step in (2, 3):
                training.update(step)
        training.close()
    if world.main:
        (folder / "counts.json").write_text(json.dumps(found))
