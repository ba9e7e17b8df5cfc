"""Fixtures, built on the fly and once a session: shards, a tiny teacher, its path."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")

from models.miniature import build_miniature
from models.settings import MiniatureSettings
from trainer.distributed.logs import no_progress_bars
from trainer.distributed.world import World, start
from trainer.pretrain import pretrain
from trainer.record import record
from trainer.training.run import Run

LINEAR = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def own_linear():
    """ZeRO-3 puts its own in its place for the whole process. That one rounds otherwise: a later test would not have the
    bits of the process that it is compared with."""
    torch.nn.functional.linear = LINEAR
    yield
    torch.nn.functional.linear = LINEAR


@pytest.fixture(scope="session")
def world() -> World:
    no_progress_bars()
    return start()


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A root folder with the digits' shards."""
    from data.digits import build_digits

    root = tmp_path_factory.mktemp("root")
    build_digits(root / "shards")
    return root


@pytest.fixture(scope="session")
def pipeline(shards) -> Path:
    """The folder of the smallest pipeline, untrained."""
    folder = shards / "untrained"
    settings = MiniatureSettings(unet_channels=(16, 32), vae_channels=(16, 16), text_widths=(8, 8), pooled=16)
    build_miniature(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def root(shards, world) -> Path:
    """A root folder with shards, and a run `base` that has a tiny pipeline and a recorded path of three nodes."""
    from support import tiny

    settings = tiny(shards, "base", "record.nodes=3")
    pretrain(Run(settings, world))
    record(Run(settings, world))
    return shards


@pytest.fixture(scope="session")
def lora_path(root, world) -> Path:
    """A path of LoRA nodes of the shared teacher, recorded by one process."""
    from support import RECORDING, lora, tiny

    record(Run(tiny(root, "lora-base", *RECORDING, *lora(root)), world))
    return root / "lora-base" / "path"
