"""Checkpoints of everything, and exact resume.

A checkpoint is one folder, `checkpoints/step-00000500/`, that holds every trained role's engine, each rank's own state
(EMA slices, global generators, meters, the stage's state) and, for evaluation jobs, the current weights as a plain
UNet or LoRA folder. It is written under a temporary name, renamed when every rank is done, and only then named by LATEST,
which is replaced atomically: whatever dies when, LATEST names a whole checkpoint. DeepSpeed's own `latest` is not
used, since it names a tag before all ranks have written it. Frozen roles stay out: the teacher is known by its hash.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from trainer.distributed import World, barrier, from_main
from trainer.engines import Role
from trainer.errors import UserError
from trainer.telemetry import log
from trainer.weights import sync_file

FORMAT = 1
WEIGHTS = "weights"  # in a checkpoint: what an evaluation reads, a plain UNet or LoRA folder


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def global_generators(device: torch.device) -> dict:
    """State of this rank's global random generators."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_generators(state: dict, device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclass
class Checkpoints:
    """The checkpoints of one stage. `identity` is what a resumed run must have in common with the saved one."""

    folder: Path
    world: World
    roles: dict[str, Role]
    identity: dict
    keep_last: int = 2
    keep_weights_every: int = 0
    root: Path = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.folder / "checkpoints"
        self.trained = {name: role for name, role in self.roles.items() if role.trained}

    def latest(self) -> Path | None:
        """The checkpoint that LATEST names, if any."""
        file = self.folder / "LATEST"
        return self.root / file.read_text().strip() if file.exists() else None

    def save(self, step: int, state: dict, write_weights: Callable[[Path], None] | None) -> Path:
        """Writes the checkpoint of `step` finished steps. Every rank must call it."""
        final, temporary = self.root / step_name(step), self.root / (step_name(step) + ".tmp")
        if self.world.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier(self.world)
        for role in self.trained.values():
            role.save_engine(temporary / "engines")
        mine = state | {"generators": global_generators(self.world.device)}
        file = temporary / f"rank-{self.world.rank:05d}.pt"
        torch.save(mine, file)
        sync_file(file)
        if write_weights:
            write_weights(temporary / WEIGHTS)
        barrier(self.world)
        if self.world.main:
            about = {"format": FORMAT, "step": step, "world_size": self.world.size, "identity": self.identity}
            (temporary / "state.json").write_text(json.dumps(about, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)  # left by a run that died between the rename and LATEST
            os.replace(temporary, final)
            self._point(step)
            self._prune(step)
        barrier(self.world)
        return final

    def _point(self, step: int) -> None:
        temporary = self.folder / "LATEST.tmp"
        temporary.write_text(step_name(step) + "\n")
        sync_file(temporary)
        os.replace(temporary, self.folder / "LATEST")

    def _prune(self, latest: int) -> None:
        """Keeps the last `keep_last` whole; of older ones keeps the plain weights of every `keep_weights_every`-th."""
        steps = sorted(int(p.name[5:]) for p in self.root.glob("step-????????") if (p / "state.json").exists())
        older = [s for s in steps if s <= latest][: -self.keep_last]
        for step in older:
            whole = self.root / step_name(step)
            if self.keep_weights_every and step % self.keep_weights_every == 0:
                (whole / "state.json").unlink()
                for part in whole.iterdir():
                    if part.name != WEIGHTS:
                        shutil.rmtree(part) if part.is_dir() else part.unlink()
            else:
                shutil.rmtree(whole)

    def load(self) -> tuple[int, dict] | None:
        """Resumes from LATEST: loads the engines and returns (finished steps, this rank's state), or None if there is
        nothing to resume from. Raises UserError if the checkpoint belongs to another run or is damaged."""
        latest = self.folder / "LATEST"
        name = from_main(latest.read_text().strip() if latest.exists() else None, self.world)
        if name is None:
            return None
        folder = self.root / name
        try:
            about = json.loads((folder / "state.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"{latest} names {folder}, which is damaged ({error}): write another step's name there"
            ) from error
        self._check(about, folder)
        for key, role in self.trained.items():
            try:
                loaded = role.load_engine(folder / "engines")
            except Exception as error:  # DeepSpeed raises whatever torch.load and its own asserts raise
                raise UserError(
                    f"checkpoint {folder}: {key} cannot be loaded: {type(error).__name__}: {error}"
                ) from error
            if not loaded:
                raise UserError(f"checkpoint {folder}: {key} is missing: write another step's name into {latest}")
        state = torch.load(folder / f"rank-{self.world.rank:05d}.pt", map_location="cpu", weights_only=False)
        restore_generators(state["generators"], self.world.device)
        log.info(f"resumed from {folder}: {', '.join(self.trained)} and the state of {self.world.size} processes")
        return about["step"], state

    def _check(self, about: dict, folder: Path) -> None:
        if about["format"] != FORMAT:
            raise UserError(f"checkpoint {folder} has format {about['format']}; this version reads {FORMAT}")
        if about["world_size"] != self.world.size:
            raise UserError(
                f"checkpoint {folder} was written by {about['world_size']} processes, this run has {self.world.size}: "
                "start as many"
            )
        saved = about["identity"]
        wrong = [k for k in sorted(saved | self.identity) if saved.get(k) != self.identity.get(k)]
        if wrong:
            what = "; ".join(f"{k} was {saved.get(k)}, is now {self.identity.get(k)}" for k in wrong)
            raise UserError(
                f"checkpoint {folder} belongs to another run: {what}. Set these back, choose another run folder, or "
                "start over with --fresh into an empty one"
            )
