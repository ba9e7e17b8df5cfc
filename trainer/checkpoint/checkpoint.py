"""Checkpoints of everything, and exact resume.

A checkpoint is one folder, `checkpoints/step-00000500/`, that holds every trained role's engine, each rank's own state
(EMA slices, global generators, meters, the stage's state) and, for evaluation jobs, the current weights as a plain
folder of the denoiser, or a LoRA folder. It is written under a temporary name, renamed when every rank is done, and only
then named by LATEST, which is replaced atomically: whatever dies when, LATEST names a whole checkpoint. DeepSpeed's own
`latest` is not used, since it names a tag before all ranks have written it. Frozen roles stay out: the teacher is known by
its hash.

The same number of processes and ZeRO stages load what they saved, to the bit. Others cut it anew: engines by
trainer.checkpoint.reshard_optimizer, the ranks' own state by the stage's `regroup`.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from data.sampling_order import Split
from trainer.checkpoint.directory import WEIGHTS, Retention, Shelf
from trainer.checkpoint.durable import FileWriter, Together, tensor_bytes, write_file
from trainer.checkpoint.reshard_optimizer import reshard
from trainer.checkpoint.reshard_state import merge_meters
from trainer.checkpoint.rng_state import global_generators, reseed_generators, restore_generators
from trainer.distributed.logs import log
from trainer.distributed.world import World, from_main
from trainer.engine.role import Role
from trainer.errors import RankError, UserError


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


def _read_rank(folder: Path, rank: int, mapped: bool = False) -> dict:
    """A rank's own state: nothing but tensors and plain containers. mapped: of the file only what is used is read; it
    must not be kept, since the file will be deleted."""
    return torch.load(_rank_file(folder, rank), map_location="cpu", mmap=mapped, weights_only=True)


class Checkpoints:
    """The checkpoints of one stage. Every rank makes it, and calls `save` and `load` together."""

    def __init__(
        self,
        folder: Path,
        world: World,
        roles: dict[str, Role],
        identity: dict,
        split: Split,
        retention: Retention,
    ):
        """identity: what a resumed run must have in common with the saved one. split: how the global batch is cut, which
        may differ."""
        self.world, self.identity, self.split = world, identity, split
        self.shelf = Shelf(folder, retention)
        self.trained = {name: role for name, role in roles.items() if role.trained}
        self.together = Together(world)
        for role in self.trained.values():
            role.engine.checkpoint_engine = FileWriter(self.together)
            # It copies two scripts into every checkpoint, with nothing to catch a full disk before the next barrier.
            role.engine._copy_recovery_script = lambda folder: None

    def latest(self) -> Path | None:
        """The checkpoint that LATEST names, if any."""
        name = self.shelf.latest()
        return self.shelf.root / name if name else None

    def _zero(self) -> dict[str, dict]:
        return {name: role.engine.config["zero_optimization"] for name, role in self.trained.items()}

    def save(
        self, step: int, state: dict, write_weights: Callable[[Path], None] | None, needs: Sequence[str] = ()
    ) -> Path:
        """Writes the checkpoint of `step` finished steps.

        needs: files outside of it that going back to it needs (see Shelf.needed). Raises UserError on every rank if it
        does not fit on the disk (before anything is written) or any rank cannot write its part: LATEST then still names
        the last good one.
        """
        began = time.monotonic()
        final = self.shelf.place(step)
        temporary = final.with_name(final.name + ".tmp")
        together, mine = self.together, state | {"generators": global_generators(self.world.device)}
        if self.world.main:
            with together.noting():
                self.shelf.root.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                self.shelf.make_room(step, self._first_size(mine))
                temporary.mkdir()
        self._agreed(step, temporary)
        for role in self.trained.values():
            with together.noting():
                role.save_engine(temporary / "engines")
        with together.noting():
            write_file(mine, _rank_file(temporary, self.world.rank))
        if write_weights:
            with together.noting():
                write_weights(temporary / WEIGHTS)
        self._agreed(step, temporary)
        if self.world.main:
            about = {"split": vars(self.split), "zero": self._zero(), "identity": self.identity, "needs": list(needs)}
            with together.noting():
                self.shelf.publish(step, temporary, about)
        self._agreed(step, temporary, final)
        if self.world.main:
            log.info(f"saved {final}: {self.shelf.size(step) / 1e9:.3g} GB in {time.monotonic() - began:.1f} s")
        return final

    def _first_size(self, mine: dict) -> int:
        """About the bytes of a checkpoint, by the trained parameters: master weights and two moments in float32, the network and
        the plain weights in its own precision."""
        total = tensor_bytes(mine) * self.world.size
        for role in self.trained.values():
            for _, p in role.trained_parameters():
                total += getattr(p, "ds_numel", p.numel()) * (12 + 2 * p.element_size())
        return total

    def _agreed(self, step: int, *unfinished: Path) -> None:
        """Goes on if all ranks did their part; else removes what is unfinished and raises UserError on all of them."""
        problem = self.together.agree()
        if problem is None:
            return
        latest = None
        if self.world.main:
            with self.together.noting():  # the file system may be gone altogether
                self.shelf.discard(*unfinished)
                latest = self.shelf.latest()
        latest = from_main(latest, self.world)
        last = f"the last good one is {self.shelf.root / latest}" if latest else "there is no earlier one"
        error = UserError(
            f"the checkpoint of step {step} could not be saved: {problem}; {last}. Make room, or see to the file system; "
            "then the same command goes on from there"
        )
        error.errno = self.together.errno
        raise error

    def load(self, regroup: Callable[[list[dict], Split], dict]) -> tuple[int, dict] | None:
        """Resumes from LATEST: loads the engines and returns (finished steps, this rank's state), or None if there is
        nothing to resume from.

        regroup: makes the stage's state of this rank from those of all ranks that another split saved. Raises UserError
        if the checkpoint belongs to another run or is damaged.
        """
        name = from_main(self.shelf.latest() if self.world.main else None, self.world)
        if name is None:
            return None
        folder = self.shelf.root / name
        about, damage = from_main(self.shelf.examine(name) if self.world.main else None, self.world)
        if damage:
            raise UserError(damage)
        self._check(about["identity"], folder)
        began, saved = time.monotonic(), Split(**about["split"])
        as_saved = saved == self.split and about["zero"] == self._zero()
        try:
            for key, role in self.trained.items():
                self._load_engine(role, folder / "engines" / key, saved.world, about["zero"][key])
            if as_saved:
                state = _read_rank(folder, self.world.rank)
            else:
                state = self._regrouped([_read_rank(folder, rank, True) for rank in range(saved.world)], saved, regroup)
        except (UserError, torch.AcceleratorError, torch.OutOfMemoryError, dist.DistError):
            raise  # nothing is wrong with the files
        except Exception as error:  # DeepSpeed raises whatever torch.load and its own asserts raise
            raise RankError(self.shelf.damaged(name, f"{type(error).__name__}: {error}")) from error
        if self.world.rank < saved.world:
            restore_generators(state["generators"], self.world.device)
        else:
            reseed_generators(self.identity["seed"], about["step"], self.world.rank)
        anew = "" if as_saved else f", cut anew from {saved} to {self.split}"
        seconds = time.monotonic() - began
        log.info(f"resumed from {folder}: {', '.join(self.trained)} and the stage{anew}, in {seconds:.1f} s")
        return about["step"], state

    def _regrouped(self, ranks: list[dict], saved: Split, regroup: Callable[[list[dict], Split], dict]) -> dict:
        own = ranks[min(self.world.rank, saved.world - 1)]
        stage = regroup([rank["stage"] for rank in ranks], saved)
        return own | {"stage": stage, "meters": merge_meters([rank["meters"] for rank in ranks], saved, self.split)}

    def _load_engine(self, role: Role, folder: Path, world: int, zero: dict) -> None:
        same = world == self.world.size and zero == self._zero()[role.name]
        if same or zero["stage"] == role.stage == 0:
            if not role.load_engine(folder.parent):
                raise OSError(f"{role.name} is missing")
        else:
            reshard(role, folder, zero["stage"])

    def _check(self, saved: dict, folder: Path) -> None:
        wrong = [k for k in sorted(saved | self.identity) if saved.get(k) != self.identity.get(k)]
        if wrong:
            what = "; ".join(f"{k} was {saved.get(k)}, is now {self.identity.get(k)}" for k in wrong)
            raise UserError(
                f"checkpoint {folder} belongs to another run: {what}. Set these back, choose another run folder, or "
                "start over with --fresh into an empty one"
            )
