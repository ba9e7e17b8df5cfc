"""Stall of a target switch, against a training step and against reading the node only when it is due.

    torchrun --nproc-per-node 2 benchmarks/switch.py [--width 128] [--config teacher]

Prints the ratio; fails if the switch stalls training for longer than one step (a guided forward pass of the teacher on one
sample, and a forward and backward pass of its student).
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from models.conditioning import Conditioning
from models.denoise import predict, predict_guided
from models.pipeline import empty_network
from trainer.config.deepspeed import deepspeed_config
from trainer.config.schema import OptimizerSettings
from trainer.distributed.world import World, barrier, finish, from_main, start
from trainer.engine.role import Role
from trainer.path.target import ReadAhead


def save_nodes(root: Path, width: int) -> None:
    for node in ("one", "other"):
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            norm_num_groups=8,
            attention_head_dim=(2, 4),
            cross_attention_dim=64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        )
        unet.save_pretrained(root / node)


def measure(root: Path, world: World, name: str) -> float:
    """Prints the medians on rank 0; returns the stall as a share of a step."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 32, 32, generator=generator), torch.tensor([500])
    states, pooled = torch.randn(1, 16, 64, generator=generator), torch.randn(1, 32, generator=generator)
    x, t, cond = (
        x.to(world.device),
        t.to(world.device),
        Conditioning(states, pooled, torch.ones(1, 6)).map(lambda v: v.to(world.device)),
    )
    frozen = deepspeed_config(name, 1, 1, 0.0, "fp32", world.size)
    trained = deepspeed_config("zero2", 1, 1, 0.0, "fp32", world.size)
    teacher = Role("teacher", empty_network(root / "one"), frozen, world, folder=root / "one")
    student = Role("generator", empty_network(root / "one"), trained, world, OptimizerSettings(lr=1e-6), root / "one")
    reader = ReadAhead(teacher.weights, world.device)

    def timed(call) -> float:
        barrier(world)
        began = time.monotonic()
        call()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - began

    def step() -> None:
        with torch.no_grad():
            guided, _ = predict_guided(teacher, x, t, cond, 2.0)
        student.step((predict(student, x, t, cond) - guided).square().mean(), 1e-6)

    def switch(folder: Path) -> None:
        teacher.weights.write(reader.take(folder))
        reader.written()

    stalls, lates, steps = [], [], []
    for turn in range(6):
        folder = root / ("other", "one")[turn % 2]
        reader.begin(folder)
        steps += [timed(step) for _ in range(3)]
        stalls.append(timed(lambda folder=folder: switch(folder)))
        lates.append(timed(lambda folder=folder: switch(folder)))
    reader.close()
    stall, late, pace = (statistics.median(v) for v in (stalls, lates, steps))
    if world.main:
        size = sum(s.numel for s in teacher.weights.slices)
        print(
            f"{size / 1e6:.0f} M parameters, {name}, {world.size} processes on {world.device.type}: step {pace:.3f} s"
        )
        print(f"switch read ahead {stall:.3f} s = {stall / pace:.3f} steps; not read ahead {late:.3f} s")
    return from_main(stall / pace, world)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--config", default="teacher")
    args = parser.parse_args()
    world = start()
    with tempfile.TemporaryDirectory() as mine:
        root = Path(from_main(mine, world))
        if world.main:
            save_nodes(root, args.width)
        barrier(world)
        ratio = measure(root, world, args.config)
        barrier(world)
    finish()
    return 0 if ratio < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
