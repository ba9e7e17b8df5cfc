"""safetensors files: ours are readable by the library, and the library's by us."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.errors import ModelError
from models.tensorfile import TensorFile, write_tensors


def test_ranges_of_a_file_that_the_library_wrote(tmp_path):
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.zeros(0), "d": torch.tensor(4)}
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "f")
    assert file.shapes == {k: tuple(v.shape) for k, v in tensors.items()}
    assert torch.equal(file.read("a", 3, 33), tensors["a"].reshape(-1)[3:33])
    assert torch.equal(file.read("b", 0, 3), tensors["b"]) and file.read("c", 0, 0).numel() == 0
    assert file.read("d", 0, 1).item() == 4
    file.close()
    raw = (tmp_path / "f").read_bytes()
    for cut in (0, 5, 60, len(raw) - 1):
        (tmp_path / "f").write_bytes(raw[:cut])
        with pytest.raises(ModelError, match="not a complete safetensors file"):
            TensorFile(tmp_path / "f")


def test_a_file_that_we_wrote_in_the_library(tmp_path):
    tensors = {"a": torch.randn(700, 5), "b": torch.randn(3, 2).bfloat16().t(), "c": torch.arange(3)}
    digest, size = write_tensors(tmp_path / "f", tensors)
    assert (hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest(), (tmp_path / "f").stat().st_size) == (
        digest,
        size,
    )
    again = load_file(tmp_path / "f")
    assert again.keys() == tensors.keys() and all(torch.equal(v, again[k]) for k, v in tensors.items())
    with safe_open(tmp_path / "f", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
