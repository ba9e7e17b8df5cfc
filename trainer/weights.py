"""Weights in and out of sharded roles: every rank reads and writes only the slices that it owns."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import ModelError
from models.pipeline import WEIGHTS_FILE, replace_folder, weight_files
from trainer.distributed import World


class Slice:
    """This rank's part of one parameter.

    Below ZeRO-3 it is the whole parameter. Under ZeRO-3 a parameter of n elements is cut, flat, into `world.size`
    pieces of ps = ds_tensor.ds_numel elements (the last one padded), and rank r owns [r ps, min((r + 1) ps, n)).
    """

    def __init__(self, key: str, parameter: nn.Parameter, world: World):
        self.key, self.parameter = key, parameter
        self.sharded = hasattr(parameter, "ds_tensor")
        self.shape = tuple(parameter.ds_shape if self.sharded else parameter.shape)
        if self.sharded:
            piece, total = parameter.ds_tensor.ds_numel, parameter.ds_numel
            self.start, self.end = min(world.rank * piece, total), min((world.rank + 1) * piece, total)
        else:
            self.start, self.end = 0, parameter.numel()

    @property
    def tensor(self) -> Tensor:
        """The live weights: whole below ZeRO-3, else flat and without padding."""
        if not self.sharded:
            return self.parameter.data
        return self.parameter.ds_tensor.data.view(-1)[: self.end - self.start]

    def write(self, value: Tensor) -> None:
        """Copies a tensor of this slice's shape into the live weights."""
        self.tensor.copy_(value)
        if self.sharded and self.parameter.data.numel() == self.parameter.ds_numel:
            # A parameter that ZeRO-3 keeps gathered ("persistent") has another copy, now stale: let go of it, and the
            # next forward pass gathers it again.
            self.parameter.partition()

    def read(self, handle: safe_open) -> Tensor:
        """This slice from an open safetensors file; of a large tensor only the covering rows are read."""
        if not self.sharded:
            return handle.get_tensor(self.key)
        if len(self.shape) < 2:
            return handle.get_tensor(self.key).view(-1)[self.start : self.end]
        row = 1
        for side in self.shape[1:]:
            row *= side
        first, last = self.start // row, -(-self.end // row)
        rows = handle.get_slice(self.key)[first:last].reshape(-1)
        return rows[self.start - first * row : self.end - first * row]


def read_folder(slices: list[Slice], folder: Path, variant: str = "") -> list[Tensor]:
    """This rank's slices of a weights folder, strictly: every key of the network and no other, every shape.

    No rank reads or holds more than its own part (and the rows around it). Nothing is written, so that a folder that
    does not fit leaves the live weights as they are. Raises ModelError.
    """
    wanted = {s.key: s for s in slices}
    handles = {}
    for file in weight_files(folder, variant):
        try:
            handle = safe_open(file, framework="pt")
        except Exception as error:  # safetensors' own error type is not public
            raise ModelError(f"{file}: not a whole safetensors file: {error}") from error
        handles |= dict.fromkeys(handle.keys(), (handle, file))
    missing, unexpected = sorted(wanted.keys() - handles.keys()), sorted(handles.keys() - wanted.keys())
    if missing or unexpected:
        raise ModelError(f"{folder}: does not fit the network: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for key, s in wanted.items():
        handle, file = handles[key]
        shape = tuple(handle.get_slice(key).get_shape())
        if shape != s.shape:
            raise ModelError(f"{file}: {key} has shape {shape}, the network has {s.shape}")
    return [s.read(handles[s.key][0]) for s in slices]


def save_folder(state: dict[str, Tensor], config: dict, folder: Path, dtype: torch.dtype) -> Path:
    """Writes a whole state dict as a folder that its class loads with from_pretrained. Atomic; rank 0 only.

    config: the network's own configuration (`network.config`). Returns the weights file.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {key: value.to(dtype).contiguous() for key, value in state.items()}
    save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
    plain = {k: v for k, v in config.items() if not (k.startswith("_") and k != "_class_name")}
    (temporary / "config.json").write_text(json.dumps(plain, indent=2, default=str) + "\n")
    sync_file(temporary / WEIGHTS_FILE)
    replace_folder(temporary, folder)
    return folder / WEIGHTS_FILE


def sync_file(file: Path) -> None:
    """Waits until a file's bytes are on the disk: a rename must not become durable before them."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
