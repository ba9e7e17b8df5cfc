"""What several tests and the worker processes share: a tiny run, trained through the real stages."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.backtrack import Backtracking
from trainer.config.load import load_settings
from trainer.config.schema import RunSettings
from trainer.distributed.world import World
from trainer.errors import Stopped
from trainer.training.loop import train
from trainer.training.run import Run

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = REPOSITORY / "configs" / "tiny_sdxl.yaml"
TIMES = {
    "time",
    "step_seconds",
    "data_seconds",
    "images_per_second",
    "memory_gb",
    "tflops_per_gpu",
    "mfu",
    "save_seconds",
}
ALIKE = ("loss/fake_score", "mismatch", "grad_norm/generator", "grad_norm/fake_score", "lr/generator")
STAGES = ("zero0", "zero1", "zero2", "sharded")  # the last is `sharded_zero3`
ENGINES = ("teacher_ds_config", "generator_ds_config", "fake_score_ds_config")
# AdamW divides by the square root of tiny second moments: sign noise of the last bit would grow to a whole step.
EPS = ("backtrack.generator.eps=1e-4", "backtrack.fake_score.eps=1e-4", "record.optimizer.eps=1e-4")
# Everything that could go wrong over ranks: two fake updates a turn, accumulation, clipping that bites, guidance.
PARITY = (*EPS, "backtrack.accumulation=2", "backtrack.fake_updates=2", "backtrack.clip=0.05", "backtrack.steps=8")
RECORDING = (*EPS, "record.nodes=3", "record.clip=0.05", "record.accumulation=2")
# LoRA in place of whole networks; alpha / rank is not 1, so that forgetting it shows.
LORA = ("lora.rank=4", "lora.alpha=2", "record.optimizer.lr=2e-3")
LORA += ("backtrack.generator.lr=1e-3", "backtrack.fake_score.lr=1e-3")


def lora(root: Path) -> tuple[str, ...]:
    """Overrides of a LoRA run on the LoRA path beside the shared pipeline of `root`."""
    return (*LORA, f"path={root / 'lora-base' / 'path'}")


def lora_gan(root: Path, stage: str) -> tuple[str, ...]:
    """The same with the GAN term, and what could go wrong over ranks."""
    return (*PARITY, *lora(root), "gan.enabled=true", "backtrack.steps=4", *zero(stage))


def everything(root: Path, stage: str) -> tuple[str, ...]:
    """Overrides of a run with adapters, the GAN term, accumulation, clipping and recomputed activations at once."""
    few = ("backtrack.fake_updates=1", "backtrack.steps=2", "backtrack.loop.sample_every=0")
    return (*lora_gan(root, stage), "network.checkpointing=true", *few)


def places(root: Path, name: str) -> list[str]:
    """Overrides that put a run beside the shared pipeline and path of `root`."""
    return [
        f"run={root / name}",
        f"pipeline={root / 'base' / 'pipeline'}",
        f"path={root / 'base' / 'path'}",
        f"data.train={root / 'shards'}/train-*.tar",
        f"data.heldout={root / 'shards'}/heldout-*.tar",
        f"evaluate.classifier={root / 'classifier'}",
    ]


def tiny(root: Path, name: str, *overrides: str) -> RunSettings:
    return load_settings(TINY, [*places(root, name), *overrides])


def zero(stage: str) -> list[str]:
    """Overrides that run all three roles at a ZeRO stage: a name of ds_configs/ or a JSON's path."""
    teacher = "zero0" if stage in ("zero0", "zero1", "zero2") else stage
    return [f"backtrack.{e}={teacher if e.startswith('teacher') else stage}" for e in ENGINES]


def sharded_zero3(folder: Path) -> str:
    """A ZeRO-3 configuration under which even the smallest parameter is sharded."""
    return zero3_config(folder / "sharded.json")


def zero3_config(file: Path, threshold: int = 0, **values: object) -> str:
    """A ZeRO-3 configuration that keeps parameters of up to `threshold` elements gathered, with more `values`. Every rank
    may write it: none sees half of it."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    part.write_text(json.dumps({"zero_optimization": zero} | values))
    os.replace(part, file)
    return str(file)


class Interrupted(Backtracking):
    """Backtracking that is sent a signal in the middle of chosen steps, as a cluster would send it."""

    signal_at: tuple[int, ...] = ()
    signal_rank = 0

    def update(self, step, meters, until_log):
        if step + 1 in self.signal_at and self.world.rank == self.signal_rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().update(step, meters, until_log)


def backtrack_weights(run: Run, kind: type[Interrupted] = Interrupted, **trouble: object) -> dict[str, Tensor] | None:
    """Trains stage 2 to its end or to its first stop; the generator's, fake score's and averaged weights on rank 0, or
    None if it was stopped. trouble: attributes of the stage, such as signal_at. Every rank must call it."""
    folder = run.stage_folder("backtrack")
    stage = kind(run)
    for name, value in trouble.items():
        setattr(stage, name, value)
    try:
        train(stage, run.settings.backtrack.loop, run.settings.health, folder, run.world)
    except Stopped:
        return None
    weights = {}
    for name in ("generator", "fake_score"):
        state = stage.roles[name].state_dict()
        weights |= {f"{name}.{k}": v.float() for k, v in (state or {}).items()}
    with stage.generator.averaged(stage.ema):
        state = stage.generator.state_dict()
    return weights | {f"ema.{k}": v.float() for k, v in (state or {}).items()}


def metrics(folder: Path) -> list[dict]:
    """Metrics lines without the keys that are measurements of time and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_alike(lines: list[dict], other: list[dict]) -> None:
    """Metrics lines of two runs of the same training, to rounding. The line of a target switch has no values but these:
    what costs a look at the device is not in it."""
    for mine, theirs in zip(lines, other, strict=True):
        assert mine.keys() == theirs.keys() and mine["target_node"] == theirs["target_node"]
        for key in ALIKE:
            assert theirs[key] == (mine[key] and pytest.approx(mine[key], rel=2e-3)), key
    assert any(line["mismatch"] is not None for line in lines)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max()) for k in one)


def environment() -> dict[str, str]:
    """For child processes: no rank of ours, this source tree, one thread."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in names}
    return env | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def verb(name: str, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """Runs `disback NAME ...` as a user does."""
    call = [sys.executable, "-m", "trainer.cli", name, *arguments]
    return subprocess.run(call, capture_output=True, text=True, env=environment() | env, cwd=cwd, timeout=600)


def ranks(scenario: str, root: Path, ranks: int = 2, **env: str) -> None:
    """Runs a scenario of tests/ranks.py in two processes, or more; raises with their output if it fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    call = [*launcher, str(REPOSITORY / "tests" / "ranks.py"), scenario, str(root)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment() | env, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def single(root: Path, name: str, world: World, *overrides: str) -> Run:
    return Run(tiny(root, name, *overrides), world)


def save(weights: dict[str, Tensor] | None, file: Path, world: World) -> None:
    if world.main:
        torch.save(weights, file)
