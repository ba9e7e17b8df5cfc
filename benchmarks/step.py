"""A training cycle of ours against a hand-written PyTorch loop of the same mathematics, and against its bare networks.

    OMP_NUM_THREADS=1 python -m benchmarks.step [--stages 0 1 2 3] [--rounds 5] [--small]

One process, one thread, float32, batch 1: an SDXL-shaped UNet with random weights, one generator update and five
fake-score updates with reused samples and guidance. Cycles are interleaved (A B C A B C ...), times are this process's
CPU seconds, and what is reported are medians of ratios within a round. Prints a Markdown table.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

import trainer.quiet  # noqa: F401  before the libraries
from data.writer import write_shards
from models.diffusion import Schedule
from models.miniature import MiniatureSettings, build_miniature
from models.networks import predict
from models.pipeline import load_network
from models.text import TextEncoder
from trainer.backtrack import Backtracking
from trainer.distributed import finish, start
from trainer.quiet import no_progress_bars
from trainer.run import Run
from trainer.settings import RunSettings
from trainer.telemetry import Meters

UPDATES, SCALE, CLIP, EMA, LR, T_G = 5, 8.0, 10.0, 0.999, 1e-5, 399


def make(root: Path, small: bool) -> None:
    """A pipeline with a UNet of SDXL's shape (30 M parameters; `small`: 1 M), and a shard of captions."""
    channels = (32, 64) if small else (192, 384)
    build_miniature(MiniatureSettings(resolution=32, unet_channels=channels, heads=channels[1] // 64)).save_pretrained(
        root / "pipeline"
    )
    write_shards(({"__key__": f"{i:04d}", "txt": f"caption number {i}"} for i in range(64)), root / "shards", "train")


def settings(root: Path, stage: int) -> RunSettings:
    file = root / f"stage{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    adam = {"lr": LR}
    names = {"generator_ds_config": str(file), "fake_score_ds_config": str(file)}
    backtrack = {
        "steps": 10**6 * UPDATES, "batch": 1, "path": "none", "fake_updates": UPDATES, "reuse_x0": True,
        "guidance_scale": SCALE, "clip": CLIP, "ema": EMA, "generator": adam, "fake_score": adam, **names,
    }  # fmt: skip
    data = {"train": str(root / "shards"), "resolution": 32}
    places = {"run": str(root / f"run{stage}"), "pipeline": str(root / "pipeline"), "precision": "fp32"}
    return RunSettings.model_validate(places | {"data": data, "backtrack": backtrack, "conditioning_timestep": T_G})


class Ours:
    def __init__(self, run: Run):
        run.stage_folder("backtrack")
        self.stage, self.meters, self.step = Backtracking(run), Meters(), 0
        self.stage.begin(0)
        self.networks = [role.module for role in self.stage.roles.values()]

    def cycle(self) -> None:
        for _ in range(UPDATES):
            self.stage.update(self.step, self.meters, until_log=1000)
            self.step += 1


class Minimal:
    """The same cycle with nothing around it: plain modules, torch's optimizer, one batch in memory."""

    def __init__(self, root: Path, schedule: Schedule, shape: tuple[int, int, int]):
        self.networks = [load_network(root / "pipeline" / "unet") for _ in range(3)]
        self.teacher, self.generator, self.fake = self.networks
        self.teacher.requires_grad_(False)
        self.text = TextEncoder(root / "pipeline", torch.float32, torch.device("cpu"))
        self.schedule, self.shape = schedule, (1, *shape)
        self.adam = {n: torch.optim.AdamW(n.parameters(), lr=LR, fused=True) for n in (self.generator, self.fake)}
        self.ema = [p.detach().clone() for p in self.generator.parameters()]

    def update(self, net: torch.nn.Module, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        self.adam[net].step()
        self.adam[net].zero_grad(set_to_none=True)

    def noised(self, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t, eps = torch.randint(20, 980, (1,)), torch.randn(self.shape)
        return self.schedule.add_noise(x0, eps, t), eps, t

    def cycle(self) -> None:
        cond, z, t_g = self.text.encode(["a caption"], 32), torch.randn(self.shape), torch.tensor([T_G])
        x0 = self.schedule.to_x0(predict(self.generator, z, t_g, cond), z, t_g)
        sample = x0.detach()
        with torch.no_grad():
            x_t, _, t = self.noised(sample)
            both = predict(self.teacher, x_t.repeat(2, 1, 1, 1), t.repeat(2), cond.doubled())
            empty, full = both.chunk(2)
            real = self.schedule.to_x0(empty + SCALE * (full - empty), x_t, t)
            fake = self.schedule.to_x0(predict(self.fake, x_t, t, cond), x_t, t)
            gradient = (fake - real) / (sample - real).abs().mean()
        self.update(self.generator, (x0 * gradient).mean())
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.generator.parameters()), 1 - EMA)
        for _ in range(UPDATES):
            x_t, eps, t = self.noised(sample)
            self.update(self.fake, mse_loss(predict(self.fake, x_t, t, cond), eps))


class Bare(Minimal):
    """Only the network calls of the cycle, forward and backward."""

    def update(self, net: torch.nn.Module, loss: torch.Tensor) -> None:
        loss.backward()
        net.zero_grad(set_to_none=True)


def calls(thing: Ours | Minimal) -> int:
    """Samples that pass through networks in one cycle, counted by hooks."""
    seen = []
    hooks = [n.register_forward_hook(lambda m, a, o: seen.append(len(a[0]))) for n in thing.networks]
    thing.cycle()
    for hook in hooks:
        hook.remove()
    return sum(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="1 M parameters: to try the script")
    args = parser.parse_args()
    torch.set_num_threads(1)
    no_progress_bars()
    world = start()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, args.small)
        # One at a time beside the minimal loop: three roles of each would not fit a small machine.
        print(
            "| implementation | CPU time / minimal | wall time / minimal | CPU s a cycle | samples through networks |"
        )
        print("|---|---|---|---|---|")
        for stage in args.stages:
            ours = Ours(Run(settings(root, stage), world))
            shape = ours.stage.sampler.latent_shape
            things = {"minimal loop": Minimal(root, ours.stage.schedule, shape), f"ours, ZeRO-{stage}": ours}
            if stage == args.stages[0]:
                things["networks alone"] = Bare(root, ours.stage.schedule, shape)
            counts = {name: calls(thing) for name, thing in things.items()}  # also the warm-up
            spent: dict[str, list[tuple[float, float]]] = {name: [] for name in things}
            for _ in range(args.rounds):
                for name, thing in things.items():
                    cpu, wall = time.process_time(), time.perf_counter()
                    thing.cycle()
                    spent[name].append((time.process_time() - cpu, time.perf_counter() - wall))
            for name, times in spent.items():
                ratios = [
                    statistics.median(
                        mine[i] / base[i] for mine, base in zip(times, spent["minimal loop"], strict=True)
                    )
                    for i in (0, 1)
                ]
                seconds = statistics.median(cpu for cpu, _ in times)
                print(f"| {name} | {ratios[0]:.3f} | {ratios[1]:.3f} | {seconds:.3f} | {counts[name]} |", flush=True)
            ours.stage.close()
    finish()


if __name__ == "__main__":
    main()
