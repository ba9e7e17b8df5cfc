"""Training in aspect-ratio buckets: its data and runs, and a scenario for two ranks; ranks.py runs it."""

import io
from pathlib import Path

import numpy as np
import support
from PIL import Image

from data.shard_writer import write_shards
from models.miniature import build_miniature
from models.settings import MiniatureSettings
from trainer.record import Recording
from trainer.training.loop import train
from trainer.training.run import Run

SIZES = [(8, 8), (12, 8), (8, 16), (9, 9), (24, 10), (10, 30), (20, 8)]  # width, height of the images, in turn
BUCKETS = [(8, 8), (8, 16), (16, 8)]
SMALL = MiniatureSettings(unet_channels=(16, 32), vae_channels=(16, 16), text_widths=(8, 8), pooled=16)
FLAGS = (
    *support.PARITY,
    "precision=fp32",
    "data.buckets=[[8, 8], [8, 16], [16, 8]]",
    "backtrack.path=none",
    "backtrack.loop.save_every=3",
    "backtrack.generator.lr=1e-3",
    "backtrack.fake_score.lr=1e-3",
    "record.steps=6",
    "record.accumulation=2",
    "record.nodes=2",
)
KINDS = {
    "plain": (),
    "reuse": ("backtrack.reuse_x0=true", "gan.enabled=true"),
    "gan": ("gan.enabled=true", "gan.shared_pass=false", "data.crop=random", "data.flip=true"),
}


def build(root: Path) -> Path:
    """A folder with a miniature pipeline and 42 captioned images in three shards."""
    folder, rng = root / "in-buckets", np.random.default_rng(0)
    build_miniature(SMALL).save_pretrained(folder / "pipeline")
    samples = []
    for number in range(42):
        width, height = SIZES[number % len(SIZES)]
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "png")
        meta = {"number": number, "score": number / 42, "blip": f"picture {number}"}
        samples.append({"__key__": f"k{number:02d}", "png": file.getvalue(), "txt": f"image {number}", "json": meta})
    write_shards(samples, folder / "images", "s", 14)
    return folder


def run_in_buckets(root: Path, name: str, world, *overrides: str, data: str = "images") -> Run:
    place, name = root / "in-buckets", f"in-buckets-{name}"
    settings = support.tiny(
        root, name, *FLAGS, f"pipeline={place}/pipeline", f"path={root / name}/path", f"data.train={place / data}",
        f"data.heldout={place / 'images'}", f"pretrain.start={place}/pipeline", *overrides,
    )  # fmt: skip
    return Run(settings, world)


def recorded(run: Run) -> dict:
    """The fake score's weights after recording, on rank 0."""
    stage = Recording(run)
    train(stage, run.settings.record.loop, run.settings.health, run.stage_folder("record"), run.world)
    return {key: value.float() for key, value in (stage.fake_score.state_dict() or {}).items()}


def buckets(root, world):
    """Both stages on two ranks; backtracking also stopped and resumed."""
    out = root / "buckets"
    support.save(recorded(run_in_buckets(root, "two-record", world)), out / "record.pt", world)
    for kind, flags in KINDS.items():
        run = run_in_buckets(root, f"two-{kind}", world, *flags)
        assert support.backtrack_weights(run, signal_at=(4,), signal_rank=1) is None
        support.save(support.backtrack_weights(run), out / f"{kind}.pt", world)
