"""Weights folders written by rank 0, atomically; and in the background, while training goes on."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from models.lora import CONFIG_FILE, LORA_FILE, adapter_note
from models.pipeline import NOTE, WEIGHTS_FILE, replace_folder
from models.tensorfile import write_tensors
from trainer.distributed.world import World, first_problem
from trainer.errors import UserError

ABOUT = "node.json"  # in a recorded folder: what it is, and its weights file's sha256 and size


def save_folder(
    state: dict[str, Tensor], config: dict, folder: Path, dtype: torch.dtype | None = None, about: dict | None = None
) -> None:
    """Writes a whole state dict as a folder that its class loads with from_pretrained. Atomic; rank 0 only.

    config: the network's own configuration (`network.config`). dtype: default: as it is. about: if given, is kept in the
    folder as node.json, together with the weights file's sha256 and its size in bytes.
    """
    plain = {k: v for k, v in config.items() if not (k.startswith("_") and k != "_class_name")}
    texts = {"config.json": json.dumps(plain, indent=2, default=str) + "\n"}
    _save(state, folder, dtype, about, WEIGHTS_FILE, {}, texts)


def save_adapter(
    state: dict[str, Tensor],
    net: nn.Module,
    base: str,
    folder: Path,
    dtype: torch.dtype | None = None,
    about: dict | None = None,
) -> None:
    """Writes an adapter's state dict as a LoRA folder (models.lora). net: the network that carries the adapter. base:
    sha256 of the weights that it belongs on. All else as `save_folder`."""
    header, config = adapter_note(net)
    texts = {CONFIG_FILE: config, NOTE: json.dumps({"kind": "lora", "base": base}, indent=2) + "\n"}
    _save(state, folder, dtype, about, LORA_FILE, header, texts)


def _save(
    state: dict[str, Tensor],
    folder: Path,
    dtype: torch.dtype | None,
    about: dict | None,
    name: str,
    note: dict[str, str],
    texts: dict[str, str],
) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file, text in texts.items():
        (temporary / file).write_text(text)
    tensors = {key: value.to(dtype or value.dtype) for key, value in state.items()}
    digest, size = write_tensors(temporary / name, tensors, note)
    if about is not None:
        (temporary / ABOUT).write_text(json.dumps(about | {"sha256": digest, "bytes": size}, indent=2) + "\n")
    replace_folder(temporary, folder)


class FolderWriter:
    """One folder at a time: a second one waits for the first, so that no more than two are in host memory. Only rank 0
    has anything to write; no other rank waits for its disk until `join`."""

    def __init__(self, world: World):
        self.world = world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="node-writer")
        self._writing: list[Future] = []

    def begin(self, write: Callable[..., None], state: dict[str, Tensor], folder: Path, about: dict) -> None:
        """Begins to write a whole state dict, which nobody else may change, in the dtype that it has. write: what makes a
        folder of it, as `TrainStage.saver`."""
        if self._writing:
            self._writing[-1].exception()  # waits; `join` raises it
        self._writing.append(self._thread.submit(write, state, folder=folder, about=about))

    def join(self) -> None:
        """Waits until everything is on the disk. Every rank must call it; all raise the same UserError if it failed."""
        problem = None
        for future in self._writing:
            if error := future.exception():
                problem = f"weights could not be written: {error}: make room or choose another folder, then go on"
        self._writing = []
        if problem := first_problem(problem, self.world):
            raise UserError(problem)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
