"""Memory and seconds of both stages on an SDXL-shaped pipeline of about 300 M parameters, with two processes at ZeRO-3.

    python benchmarks/sdxl_shaped.py [--width 112] [--ranks 2] [--steps 2] [--precision bf16]

The UNet has SDXL's topology (three levels; 0, 2 and 10 transformer layers; text_time conditioning), random weights and
4 x 4 latents, so that memory is weights and states, not activations. It has a tenth of SDXL's parameters; the communication
buckets of ds_configs/zero3.json and teacher.json are scaled down alike. Everything is in a temporary folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import peak_bytes, reset_peak, resident_bytes

REPOSITORY = Path(__file__).resolve().parent.parent
GIB = 2**30


def build(root: Path, width: int) -> int:
    """Writes shards and a pipeline folder; returns the number of the UNet's parameters."""
    from diffusers import UNet2DConditionModel

    from data.digits import build_digits
    from models.miniature import build_miniature
    from models.settings import MiniatureSettings

    settings = MiniatureSettings()
    pipeline = build_miniature(settings)
    pipeline.unet = UNet2DConditionModel(
        sample_size=settings.latent_side,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        norm_num_groups=16,
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=sum(settings.text_widths),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=settings.pooled + 6 * 8,
    )
    pipeline.save_pretrained(root / "pipeline", safe_serialization=True)
    build_digits(root / "shards")
    return sum(p.numel() for p in pipeline.unet.parameters())


def scale(root: Path, name: str) -> None:
    """Copies a file of ds_configs/ into root, with its numbers of elements divided by ten."""
    config = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    zero |= {key: value // 10 for key, value in zero.items() if type(value) is int and key != "stage"}
    (root / f"{name}.json").write_text(json.dumps(config))


def work(root: Path, what: str, steps: int, precision: str) -> None:
    """One rank of "load", which only loads a frozen role, or of a stage; prints a line."""
    from models.pipeline import empty_network
    from trainer.backtrack import backtrack
    from trainer.config.deepspeed import deepspeed_config
    from trainer.config.load import load_settings
    from trainer.distributed.logs import no_progress_bars
    from trainer.distributed.world import barrier, finish, start
    from trainer.engine.role import Role
    from trainer.record import record
    from trainer.training.run import Run

    no_progress_bars()
    world = start()
    zero3, teacher = root / "zero3.json", root / "teacher.json"
    overrides = [
        f"run={root / 'run'}", f"pipeline={root / 'pipeline'}", f"path={root / 'path'}", f"precision={precision}",
        f"data.train={root / 'shards'}/train-*.tar", f"data.heldout={root / 'shards'}/heldout-*.tar",
        f"record.steps={steps}", "record.nodes=2", "record.probe_every=1", "record.probe=4", "record.batch=4",
        f"backtrack.steps={steps}", "backtrack.fake_updates=1", "backtrack.batch=4", "backtrack.walk.interval=1",
        "network.checkpointing=true", f"record.ds_config={zero3}", f"record.teacher_ds_config={teacher}",
        *(f"backtrack.{role}_ds_config={zero3}" for role in ("generator", "fake_score")),
        f"backtrack.teacher_ds_config={teacher}",
        *(f"{stage}.loop={{log_every: 1, sample_every: 0, save_every: 1000, trackers: []}}" for stage in ("record", "backtrack")),
    ]  # fmt: skip
    run = Run(load_settings(REPOSITORY / "configs" / "tiny_sdxl.yaml", overrides), world)

    def load() -> Role:
        folder = root / "pipeline" / "unet"
        config = deepspeed_config(str(teacher), 1, 1, 0.0, precision, world.size)
        return Role("teacher", empty_network(folder), config, world, folder=folder)

    barrier(world)
    before, began = resident_bytes(), time.monotonic()
    reset_peak()
    kept = {"load": load, "record": lambda: record(run), "backtrack": lambda: backtrack(run)}[what]()
    peak, seconds = peak_bytes(), time.monotonic() - began
    del kept  # a loaded role counts until here
    print(
        f"{what}: rank {world.rank}: peak {peak / GIB:.2f} GiB ({(peak - before) / GIB:+.2f}), {seconds:.1f} s",
        flush=True,
    )
    finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=112)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.worker[0]), args.worker[1], args.steps, args.precision)
        return 0
    with tempfile.TemporaryDirectory() as root:
        count = build(Path(root), args.width)
        for name in ("zero3", "teacher"):
            scale(Path(root), name)
        size = count * (2 if args.precision == "bf16" else 4) / GIB
        print(
            f"{count / 1e6:.0f} M parameters: {size:.2f} GiB in {args.precision}, {count * 4 / GIB:.2f} GiB on disk",
            flush=True,
        )
        call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        # Each in new processes, as for its verb: DeepSpeed's engines outlive the stage that made them.
        for what in ("load", "record", "backtrack"):
            worker = [__file__, "--worker", root, what, "--steps", str(args.steps), "--precision", args.precision]
            if code := subprocess.run(call + worker, env=env).returncode:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
