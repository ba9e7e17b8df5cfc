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
from models.lora import CONFIG_FILE, adapter_note, adapter_parameters
from models.pipeline import LORA_FILE, NOTE, WEIGHTS_FILE, replace_folder, weight_files
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


def read_folder(slices: list[Slice], folder: Path) -> list[Tensor]:
    """This rank's slices of a weights folder, strictly: every key of the network and no other, every shape.

    No rank reads or holds more than its own part (and the rows around it). Nothing is written, so that a folder that
    does not fit leaves the live weights as they are. Raises ModelError.
    """
    wanted = {s.key: s for s in slices}
    handles = {}
    for file in weight_files(folder):
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


@torch.no_grad()
def start_from(network: nn.Module, folder: Path, world: World) -> None:
    """Overwrites the adapter of a plain network with a LoRA folder's, strictly. Raises ModelError."""
    slices = [Slice(key, p, world) for key, p in adapter_parameters(network).items()]
    for s, value in zip(slices, read_folder(slices, folder), strict=True):
        s.write(value)


def save_folder(state: dict[str, Tensor], config: dict, folder: Path, dtype: torch.dtype) -> Path:
    """Writes a whole state dict as a folder that UNet2DConditionModel.from_pretrained loads. Atomic; rank 0 only.

    config: the network's own configuration (`unet.config`). Returns the weights file.
    """
    plain = {k: v for k, v in config.items() if not (k.startswith("_") and k != "_class_name")}
    texts = {"config.json": json.dumps(plain, indent=2, default=str) + "\n"}
    return _save(state, folder, dtype, WEIGHTS_FILE, {"format": "pt"}, texts)


def save_adapter(state: dict[str, Tensor], net: nn.Module, folder: Path, dtype: torch.dtype, base: str) -> Path:
    """Writes an adapter's state dict as a LoRA folder (models.lora). Atomic; rank 0 only.

    net: the network that carries the adapter. base: sha256 of the weights that it belongs on. Returns the weights file.
    """
    header, config = adapter_note(net)
    texts = {CONFIG_FILE: config, NOTE: json.dumps({"kind": "lora", "base": base}, indent=2) + "\n"}
    return _save(state, folder, dtype, LORA_FILE, header, texts)


def _save(
    state: dict[str, Tensor], folder: Path, dtype: torch.dtype, name: str, header: dict[str, str], texts: dict[str, str]
) -> Path:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, temporary / name, metadata=header)
    for file, text in texts.items():
        (temporary / file).write_text(text)
    sync_file(temporary / name)
    replace_folder(temporary, folder)
    return folder / name


def sync_file(file: Path) -> None:
    """Waits until a file's bytes are on the disk: a rename must not become durable before them."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
