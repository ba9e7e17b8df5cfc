"""Checkpoints of all that a run needs, and exact resume.

A checkpoint is a folder, `checkpoints/step-00000500/`. It holds the engine of every trained role, each rank's own state (EMA
slices, random generators, meters, ...) and, for evaluation, the current weights in float32 as a plain denoiser folder or a LoRA
folder.
It is written under a temporary name, renamed when every rank is done, and only then named by LATEST, which is replaced
atomically: whatever dies when, LATEST names a complete checkpoint. DeepSpeed's own `latest` is not used, because it names a
checkpoint that other ranks are still writing. Frozen roles stay out: the teacher is known by its hash.

With the same number of processes and the same ZeRO stages, a run loads what it saved, bit for bit. With others, the state is
resharded: engines by trainer.checkpoint.reshard_optimizer, the ranks' own state by the stage's `regroup`.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from data.sampling_order import BatchSplit
from trainer.checkpoint.collective_errors import DeferredErrors, tensor_bytes, write_file
from trainer.checkpoint.directory import FORMAT, CheckpointDirectory
from trainer.checkpoint.reshard_optimizer import reshard
from trainer.checkpoint.rng_state import global_generators, reseed_generators, restore_generators
from trainer.config.schema import LoopSettings
from trainer.distributed.logs import log
from trainer.distributed.world import World, from_main
from trainer.engine.deepspeed_internals import whole_numel
from trainer.engine.role import Role
from trainer.engine.save_weights import Snapshot
from trainer.errors import RankError, UserError


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


def _read_rank(folder: Path, rank: int, mapped: bool = False) -> dict:
    """A rank's own state, of tensors and plain containers only. mapped: reads only what is used; must not outlive the file."""
    return torch.load(_rank_file(folder, rank), map_location="cpu", mmap=mapped, weights_only=True)


class Checkpoints:
    """Saves and loads the checkpoints of a stage. Every rank makes one, and calls `save` and `load`."""

    def __init__(
        self,
        folder: Path,
        world: World,
        roles: dict[str, Role],
        identity: dict,
        split: BatchSplit,
        retention: LoopSettings,
    ):
        """identity: what a resumed run must have in common with the saved one. split: of the global batch into ranks and
        micro-batches, which may differ."""
        self.world, self.identity, self.split = world, identity, split
        self.directory = CheckpointDirectory(folder, retention)
        self.trained = {name: role for name, role in roles.items() if role.trained}
        self.errors = DeferredErrors(world)

    def latest(self) -> Path | None:
        """The checkpoint that LATEST names, if any."""
        name = self.directory.latest()
        return self.directory.root / name if name else None

    def needed(self) -> set[str]:
        """On rank 0, the files outside the checkpoints that resuming from any of them would need; elsewhere empty."""
        return self.directory.needed() if self.world.main else set()

    def _zero(self) -> dict[str, dict]:
        return {name: role.engine.config["zero_optimization"] for name, role in self.trained.items()}

    def save(
        self, step: int, state: dict, snapshots: dict[str, Callable[[], Snapshot | None]], needs: Sequence[str] = ()
    ) -> Path:
        """Writes the checkpoint of `step` finished steps.

        state: this rank's own. snapshots: for each folder of weights for evaluation, a function that gathers them; called
        one by one after the engines are written, to save memory. needs: files outside the checkpoint that resuming from it needs. Raises UserError on
        every rank if it does not fit on the disk (before anything is written) or if any rank cannot write its part;
        LATEST then still names the previous checkpoint.
        """
        began = time.monotonic()
        final = self.directory.place(step)
        temporary = final.with_name(final.name + ".tmp")
        state = state | {"generators": global_generators(self.world.device)}
        if self.world.main:
            with self.errors.defer():
                self.directory.root.mkdir(parents=True, exist_ok=True)
                self.directory.remove_unfinished()
                self.directory.make_room(step, self._estimated_size(state, len(snapshots)))
                temporary.mkdir()
        self._agree(step, temporary)
        for role in self.trained.values():
            with self.errors.defer():
                role.save_engine(temporary / "engines", self._write_engine_file)
        with self.errors.defer():
            write_file(state, _rank_file(temporary, self.world.rank))
        for name, gather in snapshots.items():
            with self.errors.defer():
                if weights := gather():
                    weights.write(temporary / name)
        self._agree(step, temporary)
        if self.world.main:
            about = {"split": vars(self.split), "zero": self._zero(), "identity": self.identity, "needs": list(needs)}
            with self.errors.defer():
                self.directory.publish(step, temporary, about)
        self._agree(step, temporary, final)
        if self.world.main:
            log.info(f"saved {final}: {self.directory.size(step) / 1e9:.3g} GB in {time.monotonic() - began:.1f} s")
        return final

    def _write_engine_file(self, state: object, file: Path) -> None:
        with self.errors.defer():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(state, file)

    def _estimated_size(self, state: dict, folders: int) -> int:
        """Bytes of a first checkpoint, roughly. Per trained parameter: master weight and two moments in float32, and its
        weight in the network's precision; for each of the folders of weights for evaluation, the largest role in float32."""
        total, largest = tensor_bytes(state) * self.world.size, 0
        for role in self.trained.values():
            count = sum(whole_numel(p) for _, p in role.trained_parameters())
            total += count * (12 + role.weights.slices[0].parameter.element_size())
            largest = max(largest, count)
        return total + 4 * largest * folders

    def _agree(self, step: int, *unfinished: Path) -> None:
        """Returns if all ranks did their part. Otherwise deletes the unfinished folders and raises UserError on all ranks."""
        problem = self.errors.agree()
        if problem is None:
            return
        latest = None
        if self.world.main:
            with self.errors.defer():  # the whole file system may be gone
                self.directory.discard(*unfinished)
                latest = self.directory.latest()
        latest = from_main(latest, self.world)
        last = f"the last good one is {self.directory.root / latest}" if latest else "there is no earlier one"
        error = UserError(
            f"the checkpoint of step {step} could not be saved: {problem}; {last}. Free disk space or check the file system, "
            "then run the same command again to resume"
        )
        error.errno = self.errors.errno
        raise error

    def load(self, regroup: Callable[[list[dict], BatchSplit], dict]) -> tuple[int, dict] | None:
        """Resumes from LATEST: loads the engines and returns (finished steps, this rank's state), or None if there is
        nothing to resume from.

        regroup: makes this rank's state of the stage from those of all ranks of a run with another split. Raises UserError
        if the checkpoint belongs to another run or is damaged.
        """
        name = from_main(self.directory.latest() if self.world.main else None, self.world)
        if name is None:
            return None
        folder = self.directory.root / name
        about, damage = from_main(self.directory.examine(name) if self.world.main else None, self.world)
        if damage:
            raise UserError(damage)
        self._check(about["identity"], folder)
        began, saved = time.monotonic(), BatchSplit(**about["split"])
        as_saved = saved == self.split and about["zero"] == self._zero() and about["format"] == FORMAT
        try:
            for key, role in self.trained.items():
                self._load_engine(role, folder / "engines" / key, saved.world, about["zero"][key])
            if as_saved:
                state = _read_rank(folder, self.world.rank)
            else:
                state = self._regrouped([_read_rank(folder, rank, True) for rank in range(saved.world)], saved, regroup)
        except (UserError, torch.AcceleratorError, torch.OutOfMemoryError, dist.DistError):
            raise  # the files are fine
        except Exception as error:  # of any type: DeepSpeed's loading has asserts
            raise RankError(self.directory.damaged(name, f"{type(error).__name__}: {error}")) from error
        if self.world.rank < saved.world:
            restore_generators(state["generators"], self.world.device)
        else:
            reseed_generators(self.identity["seed"], about["step"], self.world.rank)
        resharded = "" if as_saved else f", resharded from {saved} to {self.split}"
        seconds = time.monotonic() - began
        log.info(f"resumed from {folder}: {', '.join(self.trained)} and the stage{resharded}, in {seconds:.1f} s")
        return about["step"], state

    def _regrouped(
        self, ranks: list[dict], saved: BatchSplit, regroup: Callable[[list[dict], BatchSplit], dict]
    ) -> dict:
        own = ranks[min(self.world.rank, saved.world - 1)]
        return own | {"stage": regroup([rank["stage"] for rank in ranks], saved)}

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
