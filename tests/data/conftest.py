"""Shards built by the tests."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # the machines that run the tests share their cores


@pytest.fixture
def encode():
    """Encodes a one-colour image; `image` replaces it."""

    def build(colour=(255, 0, 0), size=(8, 8), form="png", image=None, **options) -> bytes:
        file = io.BytesIO()
        (image or Image.new("RGB", size, colour)).save(file, form, **options)
        return file.getvalue()

    return build


@pytest.fixture
def pack():
    """Packs named members into a plain tar, without our writer."""

    def build(tar: Path, members: list[tuple[str, bytes]]) -> Path:
        tar.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, raw in members:
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                archive.addfile(info, io.BytesIO(raw))
        return tar

    return build


@pytest.fixture
def shards(tmp_path, encode, pack):
    """Shards of n samples: sample i has the colour (i, 0, 0), the caption "c<i>" and {"row": i}. `change` replaces
    members ({extension: bytes}) by sample number; None drops one."""

    def build(n=24, per_shard=10, change=None, folder="shards") -> list[Path]:
        tars = []
        for first in range(0, n, per_shard):
            members = []
            for i in range(first, min(first + per_shard, n)):
                sample = {"png": encode((i, 0, 0)), "txt": f"c{i}".encode(), "json": b'{"row": %d}' % i}
                sample |= (change or {}).get(i, {})
                members += [(f"k{i:04d}.{e}", raw) for e, raw in sample.items() if raw is not None]
            tars.append(pack(tmp_path / folder / f"s-{first:06d}.tar", members))
        return tars

    return build
