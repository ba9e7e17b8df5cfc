"""What several tests and the rank processes share: tiny runs, trained through the real stages, and ways to start a verb."""

import contextlib
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from models.conditioning import Conditioning
from models.denoise import predict
from trainer import cli
from trainer.backtrack import Backtracking
from trainer.config.load import load_settings
from trainer.config.schema import RunSettings
from trainer.distributed.world import World
from trainer.errors import Stopped
from trainer.training.loop import train
from trainer.training.run import Run

REPOSITORY = Path(__file__).resolve().parent.parent
STARTUP = REPOSITORY / "tests" / "startup"
TINY = REPOSITORY / "configs" / "tiny_sdxl.yaml"
TIMES = {
    "time",
    "gpu_hours",
    "step_seconds",
    "data_seconds",
    "images_per_second",
    "memory_gb",
    "tflops_per_gpu",
    "mfu",
    "save_seconds",
}
ALIKE = ("loss/fake_score", "mismatch", "grad_norm/generator", "grad_norm/fake_score", "lr/generator")
KINDS = {"sdxl": "sdxl", "sd15": "sd", "sd21": "sd", "sd3": "sd3"}  # miniature: family
SMALLEST = {"unet_channels": (16, 32), "vae_channels": (16, 16), "text_widths": (8, 8), "pooled": 16}  # of a miniature
PROMPTS = ["a handwritten seven", "the digit two, written by hand", "a small drawing of a nine"]
CLIP = {  # the smallest CLIP: its features suffice for Frechet distances of a few dozen images
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
STAGES = ("zero0", "zero2", "sharded")  # the last is `sharded_zero3`; ZeRO 1 is the same class of DeepSpeed as 2
ENGINES = ("teacher_ds_config", "generator_ds_config", "fake_score_ds_config")
# Two programs that compute the same (one process and two, a bare network and a wrapped one, a whole batch and its parts)
# may sum in another order: their outputs agree to a few units of float32's last place. Only the same program run twice,
# resumed runs included, has the same bits.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # for values of order 1
# AdamW divides by the square root of tiny second moments: sign noise of the last bit would grow to a whole step.
EPS = ("backtrack.generator.eps=1e-4", "backtrack.fake_score.eps=1e-4", "record.optimizer.eps=1e-4")
# Everything that could go wrong over ranks: two fake updates a turn, accumulation, clipping that bites, guidance.
PARITY = (*EPS, "backtrack.accumulation=2", "backtrack.fake_updates=2", "backtrack.clip=0.05", "backtrack.steps=8")
RECORDING = (*EPS, "record.nodes=3", "record.clip=0.05", "record.accumulation=2")
GAN = ("gan.enabled=true", "gan.generator_weight=0.5", "gan.head_weight=0.5")  # weights that leave a mark in few steps
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
    few = ("backtrack.fake_updates=1", "backtrack.steps=3")
    return (*lora_gan(root, stage), "network.checkpointing=true", *few)


def gan_flags(shared: bool) -> tuple[str, ...]:
    """Overrides of a run with the GAN term: shared passes with a two-step student in pieces, or its own with the walk."""
    student = ("backtrack.student_timesteps=[999, 499]", "backtrack.path=none", "backtrack.generator_split=2")
    return *PARITY, *GAN, "backtrack.steps=4", *(student if shared else ("gan.shared_pass=false",))


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
    """Settings of a run that makes no previews, which take longer than its training, unless `overrides` say so."""
    stages = ("pretrain.autoencoder", "pretrain", "record", "backtrack")
    quiet = [f"{stage}.loop.sample_every=0" for stage in stages]
    return load_settings(TINY, [*places(root, name), *quiet, *overrides])


def tiny_clip(folder: Path) -> list[str]:
    """Writes a CLIP model with random weights; returns the overrides that evaluate with it alone."""
    if not folder.exists():
        folder.mkdir(parents=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(open_clip.CLIP(**CLIP).state_dict(), folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    return ["evaluate.features=clip", f"evaluate.clip_model=local-dir:{folder}", "evaluate.patch=6"]


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """uint8 images [H, W, 3] of sizes (width, height), coarse enough to survive a resize."""
    rng = np.random.default_rng(0)
    return [
        np.asarray(Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).resize(size)) for size in sizes
    ]


def tensors(images: list[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]


def zero(stage: str) -> list[str]:
    """Overrides that run all three roles at a ZeRO stage: a name of ds_configs/ or a JSON's path."""
    teacher = "zero0" if stage in ("zero0", "zero1", "zero2") else stage
    return [f"backtrack.{e}={teacher if e.startswith('teacher') else stage}" for e in ENGINES]


# Still one bucket for all gradients of a small network. DeepSpeed does not let go of an engine, and its default, up to 2 GB that
# nobody touches, would add up until a worker of pytest is too large to fork.
SMALL_BUCKET = {"reduce_bucket_size": 10_000_000}


def sharded_zero3(folder: Path) -> str:
    """A ZeRO-3 configuration under which even the smallest parameter is sharded, and released after each use. By default
    DeepSpeed keeps what it will use again within 1e9 elements: all of a tiny network, which it looks through after each layer,
    in almost half of the time of a run."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    return zero3_config(folder / "sharded.json", zero_optimization=zero | SMALL_BUCKET)


def zero3_config(file: Path, threshold: int = 0, **values: object) -> str:
    """A ZeRO-3 configuration that keeps parameters of up to `threshold` elements gathered, with more `values`. Every rank
    may write it: none sees half of it."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold} | SMALL_BUCKET
    part.write_text(json.dumps({"zero_optimization": zero} | values))
    os.replace(part, file)
    return str(file)


class Interrupted(Backtracking):
    """Backtracking that is sent a signal in the middle of chosen steps, as a cluster would send it."""

    signal_at: tuple[int, ...] = ()
    signal_rank = 0

    def update(self, step):
        if step + 1 in self.signal_at and self.world.rank == self.signal_rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().update(step)


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
    with stage.average.applied():
        state = stage.generator.state_dict()
    return weights | {f"ema.{k}": v.float() for k, v in (state or {}).items()}


class Poisoned(Interrupted):
    """Backtracking whose gradient on x0 is not finite in chosen steps, on one rank only."""

    bad_steps: tuple[int, ...] = ()
    bad_rank = 0

    def update(self, step):
        if step in self.bad_steps and self.world.rank == self.bad_rank:
            objective, self.objective = self.objective, lambda scores: torch.full_like(scores.x0, float("nan"))
            try:
                return super().update(step)
            finally:
                self.objective = objective
        return super().update(step)


def poisoned(run, steps, rank=0):
    return backtrack_weights(run, kind=Poisoned, bad_steps=steps, bad_rank=rank)


def plain(folder: Path, **parts: object) -> DiffusionPipeline:
    """A pipeline folder as diffusers loads it."""
    pipe = DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int) -> list[torch.Generator]:
    """For a diffusers call: the noise of our samples 0, 1, ... with seed 5."""
    return [torch.Generator("cpu").manual_seed(5 + i) for i in range(count)]


def prediction(net: torch.nn.Module) -> Tensor:
    """A tiny UNet's prediction on fixed inputs."""
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 4, 4, generator=rng), torch.tensor([10, 700])
    states, pooled = torch.randn(2, 16, 16, generator=rng), torch.randn(2, 16, generator=rng)
    with torch.no_grad():
        return predict(net, x, t, Conditioning(states, pooled, torch.ones(2, 6))).clone()


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
    """For child processes: no rank of ours, this source tree, one thread, a quick start."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in names}
    path = f"{REPOSITORY}:{STARTUP}"
    return env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def verb(name: str, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """Runs `disback NAME ...` as a user does. A process of its own costs about 8 s of CPU: see `call`."""
    command = [sys.executable, "-m", "trainer.cli", name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment() | env, cwd=cwd, timeout=600)


def call(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """`verb` in this process. Not for what ends the process or stops on a signal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([name, *arguments])
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


RANKS = REPOSITORY / "tests" / "ranks.py"
_ranks: list[tuple[subprocess.Popen, io.IOBase]] = []  # two processes that wait for a scenario, and their logs


def ranks(scenario: str, root: Path) -> None:
    """Runs a scenario of tests/ranks.py on two ranks, in processes that stay for the next one: starting them costs 20 s of
    CPU. Raises with their output if it fails."""
    if not _ranks:
        port = str(free_port())
        for rank in ("0", "1"):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (end_ranks closes it)
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            process = subprocess.Popen([sys.executable, str(RANKS)], env=environment() | env, text=True, **pipes)
            _ranks.append((process, log))
    with selectors.DefaultSelector() as answers:
        for process, _ in _ranks:
            print(scenario, root, file=process.stdin, flush=True)
            answers.register(process.stdout, selectors.EVENT_READ)
        while answers.get_map():
            for key, _ in answers.select():
                if key.fileobj.readline() != "done\n":  # a rank has failed, and the other may wait for it
                    raise AssertionError(end_ranks())
                answers.unregister(key.fileobj)


def end_ranks() -> str:
    """Ends the two processes; returns the end of what they wrote."""
    output = ""
    for rank, (process, log) in enumerate(_ranks):
        process.kill()
        process.communicate()
        log.seek(0)
        output += f"rank {rank}:\n{log.read()[-8000:]}\n"
        log.close()
    _ranks.clear()
    return output


def torchrun(scenario: str, root: Path, size: int, **env: str) -> None:
    """Runs a scenario of tests/ranks.py in processes of its own, started as users start them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [*launcher, str(RANKS), scenario, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | env, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def single(root: Path, name: str, world: World, *overrides: str) -> Run:
    return Run(tiny(root, name, *overrides), world)


def save(weights: dict[str, Tensor] | None, file: Path, world: World) -> None:
    if world.main:
        torch.save(weights, file)
