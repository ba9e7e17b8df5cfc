"""Fixtures that are built once: shards, a tiny teacher and its paths. The workers of pytest-xdist share them."""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads: child processes have one, too

import pytest
import torch
from filelock import FileLock

from models.miniature import build_miniature
from models.settings import MiniatureSettings
from trainer.distributed.logs import no_progress_bars
from trainer.distributed.world import World, start
from trainer.pretrain import pretrain
from trainer.record import record
from trainer.training.run import Run

LINEAR = torch.nn.functional.linear


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: no worker is left with a long file at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionfinish() -> None:
    from support import end_ranks

    end_ranks()
    gc.freeze()  # or the interpreter's end would look through all that the libraries have made


@pytest.fixture(autouse=True)
def own_linear():
    """ZeRO-3 replaces this function in the whole process by one that rounds differently: a later test would not have the
    bits of the process that it is compared with."""
    torch.nn.functional.linear = LINEAR
    yield
    torch.nn.functional.linear = LINEAR


@pytest.fixture(scope="session")
def world() -> World:
    no_progress_bars()
    gc.freeze()  # libraries stay: DeepSpeed collects garbage with every network that it shards
    return start()


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A function that builds something once for all workers: shared(name, build) calls build(root) unless a worker has
    done so, and returns the common root. Nobody writes there afterwards."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root /= "shared"
    root.mkdir(exist_ok=True)

    def once(name: str, build: Callable[[Path], object]) -> Path:
        done = root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                build(root)
                done.touch()
        return root

    return once


@pytest.fixture(scope="session")
def shards(shared, tmp_path_factory) -> Path:
    """This worker's root folder: the digits' shards, and the runs of its tests."""
    from data.digits import build_digits

    root = tmp_path_factory.mktemp("root")
    shutil.copytree(shared("shards", lambda common: build_digits(common / "shards")) / "shards", root / "shards")
    return root


@pytest.fixture(scope="session")
def pipeline(shards) -> Path:
    """The folder of the smallest pipeline, untrained."""
    from support import SMALLEST

    folder = shards / "untrained"
    build_miniature(MiniatureSettings(**SMALLEST)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipelines(shared) -> dict[str, Path]:
    """The folders of an untrained miniature of every kind. Nobody may change them."""
    from support import KINDS, SMALLEST

    def build(common: Path) -> None:
        for kind in KINDS:
            build_miniature(MiniatureSettings(family=kind, **SMALLEST)).save_pretrained(common / kind)

    common = shared("pipelines", build)
    return {kind: common / kind for kind in KINDS}


@pytest.fixture(scope="session")
def root(shared, shards, world) -> Path:
    """`shards`, with a run `base` that has a tiny pipeline and a recorded path of three nodes."""
    from support import tiny

    def build(common: Path) -> None:
        run = Run(tiny(common, "base", "record.nodes=3"), world)
        pretrain(run)
        record(run)

    shutil.copytree(shared("base", build) / "base", shards / "base")
    return shards


@pytest.fixture
def teacher(root) -> Path:
    """The weights folder of the shared teacher's UNet."""
    return root / "base" / "pipeline" / "unet"


@pytest.fixture(scope="session")
def lora_path(shared, root, world) -> Path:
    """A path of LoRA nodes of the shared teacher, recorded by one process."""
    from support import RECORDING, lora, tiny

    def build(common: Path) -> None:
        record(Run(tiny(common, "lora-base", *RECORDING, *lora(common)), world))

    shutil.copytree(shared("lora-base", build) / "lora-base", root / "lora-base")
    return root / "lora-base" / "path"
