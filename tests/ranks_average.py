"""The scenario of weight averages on several ranks (ranks.py runs it), and a network whose gradients are known."""

import support
import torch
from torch import nn

from models.lora import add_adapter
from models.settings import LoraSettings
from trainer.config.deepspeed import deepspeed_config
from trainer.config.schema import OptimizerSettings
from trainer.distributed.world import from_main
from trainer.engine.role import Role
from trainer.training.state_parts import WeightAverage

SIZES = {"first": (16, 16), "second": (5, 7), "third": (3, 1)}  # no border between ranks is one between weights
FP32_SUMS = "-fp32-gradients"  # another optimizer of DeepSpeed's at ZeRO-1
STAGES = ("zero1", f"zero1{FP32_SUMS}", *support.STAGES)
RATE = 1e-6
# Every weight moves by the rate, against its gradient's sign.
MEMORYLESS = OptimizerSettings(lr=RATE, betas=(0.0, 0.0), weight_decay=0.0, eps=1e-30)


class Layers(nn.ModuleDict):
    """Linear layers with weights of SDXL's size and, wherever they are computed, the same gradients."""

    def __init__(self, sizes):
        super().__init__({name: nn.Linear(columns, rows) for name, (rows, columns) in sizes.items()})
        draw = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02, generator=draw)

    def forward(self, signs):
        """A loss whose gradient on each weight is that of `signs`, 1 and -1: the layers see the identity."""
        sums = []
        for name, layer in self.items():
            out = layer(torch.eye(layer.in_features, dtype=torch.bfloat16))
            sums.append((out.float() * signs[name].T).sum())
        return sum(sums)


def averaged_role(world, stage, lora, folder):
    """A bf16 role after updates that are smaller than its weights' last place; its average and its first weights."""
    name = support.sharded_zero3(folder) if stage == "sharded" else stage.removesuffix(FP32_SUMS)
    network = Layers(SIZES)
    if lora:
        settings = LoraSettings(rank=2, targets=list(SIZES))
        add_adapter(network, settings, "average", world.device, torch.bfloat16)
    config = deepspeed_config(name, 2, 1, 0.0, "bf16", world.size, stage.endswith(FP32_SUMS))
    role = Role("generator", network, config, world, MEMORYLESS)
    average = WeightAverage(role, 0.5)
    start = role.state_dict(role.masters.local(), torch.float32)
    draw = torch.Generator().manual_seed(1)
    for _ in range(4):
        signs = {name: torch.randn(size, generator=draw).sign() for name, size in SIZES.items()}
        role.step(role(signs), RATE)
        average.update()
    return role, average, start


def average(root, world):
    """Averages at ZeRO 0 to 3: written out whole, lent to the network, and read from the equal slices of a checkpoint of
    format 3."""
    out = root / "average"
    for lora in (False, True):
        for stage in STAGES:
            role, average, _ = averaged_role(world, stage, lora, out)
            snapshot, live = average.snapshot(), role.state_dict()
            with average.applied():
                lent = role.state_dict()
            again = role.state_dict()
            whole = from_main(snapshot and snapshot.state, world)
            if world.main:
                assert all(torch.equal(lent[key], value.bfloat16()) for key, value in whole.items())
                assert all(torch.equal(again[key], value) for key, value in live.items())
            # No rank holds more than its share, and a little where pieces are padded.
            assert sum(t.numel() for t in average.ema.shadow) <= sum(v.numel() for v in whole.values()) / 2 + len(whole)
            states = [old_state(role, whole, rank, world.size) for rank in range(world.size)]
            shadow = average.regroup(states, None)["shadow"]
            assert all(torch.equal(a, b) for a, b in zip(shadow, average.ema.shadow, strict=True))
            support.save(whole, out / f"{stage}-{lora}.pt", world)


def old_state(role, whole, rank, size):
    """What a rank saved of this average in format 3: an equal part of each weight."""
    shadow, ranges = [], []
    for s in role.weights.slices:
        piece = -(-s.numel // size)
        start, end = min(rank * piece, s.numel), min((rank + 1) * piece, s.numel)
        shadow.append(whole[s.key].flatten()[start:end])
        ranges.append((start, end))
    return {"decay": 0.5, "shadow": shadow, "ranges": ranges}
