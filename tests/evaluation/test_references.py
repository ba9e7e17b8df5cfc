"""Held-out samples that cannot be used."""

import io

import pytest
import support
import torch
from PIL import Image

from data.errors import DataError
from data.shard_writer import write_shards
from trainer.distributed.world import World
from trainer.evaluation.protocols import PROTOCOLS
from trainer.evaluation.references import find_prompts, heldout_images
from trainer.training.run import Run


def test_an_unusable_sample_is_left_out_and_told(tmp_path, caplog):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(file, "png")
    texts, images = ["a", "\0", "c", "d"], [file.getvalue()] * 3 + [b"<html>"]
    samples = [
        {"__key__": f"k{i}", "png": png, "txt": text} for i, (png, text) in enumerate(zip(images, texts, strict=True))
    ]
    write_shards(samples, tmp_path / "shards", "s")
    run = Run(support.tiny(tmp_path, "x", f"data.heldout={tmp_path}/shards"), World(0, 1, 0, torch.device("cpu")))
    with caplog.at_level("WARNING", "disback"):
        prompts = find_prompts(run, PROTOCOLS["heldout"])
    assert [(prompt.text, prompt.id) for prompt in prompts] == [("a", "00000"), ("c", "00002"), ("d", "00003")]
    assert "caption has a NUL character" in caplog.text
    real = heldout_images(run)
    assert real.count == 3 and (real.image(1) == 9).all()
    with pytest.raises(DataError, match="s-000000.tar, key k3: image does not decode"):
        real.image(2)
