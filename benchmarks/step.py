"""A training cycle of the real stage against a hand-written PyTorch loop of the same mathematics, and its bare networks.

    OMP_NUM_THREADS=1 python -m benchmarks.step [--stages 0,1,2,3] [--rounds 5] [--gan] [--checkpointing] [--small]

One process, one thread, float32, batch 1: an SDXL-shaped UNet with random weights, one generator update and five
fake-score updates with reused samples and guidance. Cycles are interleaved (A B C A B C ...), times are CPU seconds of
this process, and the table has medians of the ratios within a round. FLOP are counted in a cycle that is not timed.
Prints a Markdown table.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import trainer.distributed.logs  # noqa: F401  before the libraries
from benchmarks.minimal import Bare, Minimal
from benchmarks.pipeline import write_captions
from models.miniature import build_miniature
from models.profile import count_flops
from models.settings import MiniatureSettings
from trainer.backtrack import Backtracking
from trainer.config.schema import RunSettings
from trainer.distributed.logs import no_progress_bars
from trainer.distributed.world import World, finish, start
from trainer.training.run import Run

UPDATES, RESOLUTION = 5, 32
LINEAR = F.linear  # ZeRO-3 replaces it for the whole process


def make(root: Path, small: bool) -> None:
    """A pipeline with a UNet of SDXL's shape (35 M parameters; `small`: 1 M), and a shard."""
    channels = (32, 64) if small else (192, 384)
    settings = MiniatureSettings(resolution=RESOLUTION, unet_channels=channels, heads=channels[1] // 64)
    build_miniature(settings).save_pretrained(root / "pipeline")
    write_captions(root / "shards", RESOLUTION)


def settings(root: Path, stage: int, gan: bool, checkpointing: bool) -> RunSettings:
    file = root / f"stage{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    adam = {"lr": 1e-5}
    names = {"generator_ds_config": str(file), "fake_score_ds_config": str(file)}
    backtrack = {
        "steps": 10**6 * UPDATES, "batch": 1, "path": "none", "fake_updates": UPDATES, "reuse_x0": True,
        "guidance_scale": 8.0, "clip": 10.0, "ema": 0.999, "generator": adam, "fake_score": adam, **names,
    }  # fmt: skip
    data = {"train": str(root / "shards"), "resolution": RESOLUTION}
    places = {"run": str(root / f"run{stage}"), "pipeline": str(root / "pipeline"), "precision": "fp32"}
    network, adversary = {"checkpointing": checkpointing}, {"enabled": gan}
    return RunSettings.model_validate(
        places | {"data": data, "backtrack": backtrack, "network": network, "gan": adversary}
    )


class Ours:
    """Cycles of the real stage."""

    def __init__(self, run: Run):
        run.stage_folder("backtrack")
        self.stage, self.step = Backtracking(run), 0
        self.stage.begin(0)
        self.networks = [role.module for role in self.stage.roles.values()]

    def cycle(self) -> None:
        for _ in range(UPDATES):
            self.stage.update(self.step)
            self.step += 1


def cycle(thing: Ours | Minimal) -> None:
    """One cycle; that of the minimal loop with torch's own linear layers, even if an engine has replaced them."""
    replaced = F.linear
    if isinstance(thing, Minimal):
        F.linear = LINEAR
    thing.cycle()
    F.linear = replaced


def calls(thing: Ours | Minimal) -> int:
    """Samples that pass through networks, or through their encoders, in one cycle; counted by hooks."""
    seen = []
    hooks = [n.register_forward_hook(lambda m, a, o: seen.append(len(a[0]))) for n in thing.networks]
    cycle(thing)
    for hook in hooks:
        hook.remove()
    return sum(seen)


def gflop(thing: Ours | Minimal) -> float:
    """GFLOP that a cycle executes, recomputation included. On a CPU the counter knows the math kernel only."""
    with sdpa_kernel(SDPBackend.MATH):
        return count_flops(lambda: cycle(thing)) / 1e9


def compare(root: Path, stage: int, world: World, args: argparse.Namespace, first: bool) -> None:
    """Prints the rows of one ZeRO stage."""
    run = Run(settings(root, stage, args.gan, args.checkpointing), world)
    ours = Ours(run)
    shape = ours.stage.sampler.latent_shape
    things = {"minimal loop": Minimal(run, shape), f"ours, ZeRO-{stage}": ours}
    if first:
        things["networks alone"] = Bare(run, shape)
    counts = {name: (calls(thing), gflop(thing)) for name, thing in things.items()}  # also warms up
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in things}
    for _ in range(args.rounds):
        for name, thing in things.items():
            cpu, wall = time.process_time(), time.perf_counter()
            cycle(thing)
            spent[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    for name, times in spent.items():
        pairs = list(zip(times, spent["minimal loop"], strict=True))
        ratios = [statistics.median(mine[i] / base[i] for mine, base in pairs) for i in (0, 1)]
        cpu, wall = (statistics.median(t[i] for t in times) for i in (0, 1))
        samples, work = counts[name]
        print(
            f"| {name} | {ratios[0]:.3f} | {ratios[1]:.3f} | {cpu:.3f} | {wall:.3f} | {samples} | {work:.2f} "
            f"| {work / cpu:.1f} |",
            flush=True,
        )
    ours.stage.close()
    F.linear = LINEAR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages of generator and fake score")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gan", action="store_true", help="with the GAN term and shared passes")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing, in both loops")
    parser.add_argument("--small", action="store_true", help="1 M parameters: to try the script")
    args = parser.parse_args()
    torch.set_num_threads(1)
    no_progress_bars()
    world = start()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.small)
        kind = ", ".join(name for name in ("gan", "checkpointing") if getattr(args, name)) or "plain"
        print(f"{kind}; {args.rounds} rounds; load average {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores\n")
        print(
            "| implementation | CPU time / minimal | wall time / minimal | CPU s per cycle | wall s per cycle "
            "| samples through networks | GFLOP | GFLOP per CPU s |\n|---|---|---|---|---|---|---|---|"
        )
        stages = [int(stage) for stage in args.stages.split(",")]
        # One at a time next to the minimal loop: the roles of several would not fit a small machine.
        for stage in stages:
            compare(Path(folder), stage, world, args, first=stage == stages[0])
    finish()


if __name__ == "__main__":
    main()
