"""Weights as folders: snapshots of whole networks in rank 0's memory, written atomically, also in the background."""

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from models.files import ADAPTER_CONFIG, INFO_FILE, LORA_FILE, WEIGHTS_FILE
from models.lora import adapter_metadata
from models.pipeline import replace_folder
from models.tensorfile import write_tensors
from trainer.distributed.world import World, first_problem
from trainer.errors import UserError

ABOUT = "node.json"  # in a recorded folder: what it is, and its weights file's sha256 and size


@dataclass(frozen=True)
class Snapshot:
    """A network's (or LoRA adapter's) whole weights in host memory, with all else that their folder holds.

    file: name of the weights file. metadata: of that file. texts: the other files.
    """

    state: dict[str, Tensor]
    file: str
    metadata: dict[str, str]
    texts: dict[str, str]

    @classmethod
    def of_network(cls, state: dict[str, Tensor], config: dict) -> "Snapshot":
        """For a folder that the network's class loads with from_pretrained. config: `network.config`."""
        plain = {k: v for k, v in config.items() if not (k.startswith("_") and k != "_class_name")}
        return cls(state, WEIGHTS_FILE, {}, {"config.json": json.dumps(plain, indent=2, default=str) + "\n"})

    @classmethod
    def of_adapter(cls, state: dict[str, Tensor], network: nn.Module, base: str) -> "Snapshot":
        """For a LoRA folder (see models.lora). network: carries the adapter. base: sha256 of the weights below it."""
        metadata, config = adapter_metadata(network)
        note = json.dumps({"kind": "lora", "base": base}, indent=2) + "\n"
        return cls(state, LORA_FILE, metadata, {ADAPTER_CONFIG: config, INFO_FILE: note})

    def write(self, folder: Path, about: dict | None = None) -> None:
        """Writes the folder, atomically. about: goes into its node.json, with sha256 and bytes of the weights file."""
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, text in self.texts.items():
            (temporary / name).write_text(text)
        digest, size = write_tensors(temporary / self.file, self.state, self.metadata)
        if about is not None:
            (temporary / ABOUT).write_text(json.dumps(about | {"sha256": digest, "bytes": size}, indent=2) + "\n")
        replace_folder(temporary, folder)


class FolderWriter:
    """Writes snapshots in a background thread of rank 0, one at a time. A new one waits for the last, so that at most two
    are in host memory; other ranks wait for the disk in `join` only."""

    def __init__(self, world: World):
        self.world = world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="node-writer")
        self._writing: list[Future] = []

    def begin(self, snapshot: Snapshot | None, folder: Path, about: dict) -> None:
        """Starts to write a snapshot; None, which other ranks have, is nothing to write."""
        if snapshot is None:
            return
        if self._writing:
            self._writing[-1].exception()  # waits; `join` raises it
        self._writing.append(self._thread.submit(snapshot.write, folder, about))

    def join(self) -> None:
        """Waits until everything is on the disk. Every rank must call it; if a write failed, all raise the same UserError."""
        problem = None
        for future in self._writing:
            if error := future.exception():
                problem = (
                    f"weights could not be written: {error}: free disk space or choose another folder, then resume"
                )
        self._writing = []
        if problem := first_problem(problem, self.world):
            raise UserError(problem)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
