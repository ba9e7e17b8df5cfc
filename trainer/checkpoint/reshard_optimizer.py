"""Optimizer state for another number of processes or another ZeRO stage.

Every rank looks up the ranges of the parameters that it now holds in the files of all ranks that saved them. The files
are mapped, not read: a rank touches its own part only, nothing is converted on disk and nobody waits for anybody.
(DeepSpeed's universal checkpoint would first write a file a parameter, state and rank: 400,000 for SDXL on 64 GPUs.)

Both sides are described alike, as pieces: the elements [start, end) of a parameter with their master weights and Adam
moments. What is saved and loaded is copied to the bit; only the cuts move.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.engine.role import Role
from trainer.errors import UserError

MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(optim|model)_states\.pt$")


@dataclass(frozen=True)
class Piece:
    """Elements [start, end) of the parameter `name`, counted flat. values: the master weights ("fp32") and Adam moments
    of just these elements; of a live engine they are views."""

    name: str
    start: int
    end: int
    values: dict[str, Tensor]


def _cut(name: str, start: int, numel: int, flat: dict[str, Tensor], offset: int) -> Piece:
    return Piece(name, start, start + numel, {key: v.view(-1).narrow(0, offset, numel) for key, v in flat.items()})


class SavedRole:
    """What the ranks of a checkpoint saved of one trained role.

    folder: the role's folder of DeepSpeed files. names: the role's trained parameters in the network's order. Raises
    OSError, KeyError and what else torch.load raises for a damaged file.
    """

    def __init__(self, folder: Path, stage: int, names: list[str]):
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        self.step: Tensor | int = 0
        shared = folder / "mp_rank_00_model_states.pt"
        files: dict[str, dict[int, Path]] = {"optim": {}, "model": {}}
        for file in folder.iterdir():
            if match := RANK_FILE.search(file.name):
                files[match[2]][int(match[1])] = file
        self.model = _mapped(files["model"][0] if stage == 3 else shared)
        if stage == 0:
            cuts = self._whole(names)
        else:
            optimizers = [_mapped(files["optim"][rank])["optimizer_state_dict"] for rank in range(len(files["optim"]))]
            cuts = self._stage_3(optimizers) if stage == 3 else self._stages_1_2(optimizers)
        for piece in cuts:
            self.pieces[piece.name].append(piece)

    def _moments(self, state: dict) -> dict[str, Tensor]:
        self.step = state["step"]
        return {key: state[key] for key in MOMENTS}

    def _whole(self, names: list[str]) -> Iterator[Piece]:
        """Stage 0: everything on rank 0, the masters in the module (fp32) or beside it (bf16)."""
        optimizer = self.model["optimizer"]
        if "fp32_groups" in optimizer:
            masters = [p for group in optimizer["fp32_groups"] for p in group]
            optimizer = optimizer["optimizer_state_dict"]
        else:
            masters = [self.model["module"][name] for name in names]
        for name, master, index in zip(names, masters, sorted(optimizer["state"]), strict=True):
            flat = {MASTER: master} | self._moments(optimizer["state"][index])
            yield _cut(name, 0, master.numel(), flat, 0)

    def _stages_1_2(self, optimizers: list[dict]) -> Iterator[Piece]:
        """One flat tensor a group, cut at any element: a parameter's parts follow each other rank by rank."""
        seen: dict[str, int] = defaultdict(int)
        for saved in optimizers:
            for group, fragments in enumerate(saved["param_slice_mappings"]):
                master = saved["single_partition_of_fp32_groups"][group]
                flat = {MASTER: master} | self._moments(saved["base_optimizer_state"]["state"][group])
                for name, place in fragments.items():
                    yield _cut(name, seen[name], place.numel, flat, place.start)
                    seen[name] += place.numel

    def _stage_3(self, optimizers: list[dict]) -> Iterator[Piece]:
        """Every parameter is cut into equal parts, the last ones padded; a rank's parts are laid out group by group."""
        world = len(optimizers)
        for rank, saved in enumerate(optimizers):
            for group, shapes in enumerate(self.model["param_shapes"]):
                flat = {MASTER: saved["fp32_flat_groups"][group]}
                flat |= self._moments(saved["optimizer_state_dict"]["state"][group])
                offset = 0
                for name, shape in shapes.items():
                    part = -(-shape.numel() // world)
                    start = min(rank * part, shape.numel())
                    yield _cut(name, start, min(part, shape.numel() - start), flat, offset)
                    offset += part

    def fill(self, piece: Piece) -> None:
        """Copies a live piece's values from the saved ones. Raises UserError if they do not cover it."""
        filled = 0
        for saved in self.pieces[piece.name]:
            low, high = max(piece.start, saved.start), min(piece.end, saved.end)
            if low < high:
                for key, live in piece.values.items():
                    live[low - piece.start : high - piece.start].copy_(
                        saved.values[key][low - saved.start : high - saved.start]
                    )
                filled += high - low
        if filled != piece.end - piece.start:
            raise UserError(
                f"{piece.name}: {filled} of the elements {piece.start} to {piece.end} are in the checkpoint"
            )


def _mapped(file: Path) -> dict:
    # DeepSpeed pickles objects of its own classes in these; they are trusted as DeepSpeed's own loading trusts them.
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _live_moments(role: Role, master: Tensor, step: Tensor | int) -> dict[str, Tensor]:
    """The Adam moments of a live master tensor, made if the optimizer has not stepped yet, and its step set."""
    optimizer = role.engine.basic_optimizer
    state = optimizer.state[master]
    if isinstance(optimizer, torch.optim.AdamW):
        # As torch's own loading does: a fused optimizer counts on the device.
        device = master.device if optimizer.defaults["fused"] else "cpu"
        state["step"] = torch.as_tensor(float(step), dtype=torch.float32, device=device)
    else:
        state["step"] = int(step)  # DeepSpeedCPUAdam
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(master.data)
    return {key: state[key] for key in MOMENTS}


def _live_pieces(role: Role, step: Tensor | int) -> Iterator[Piece]:
    """What this rank's optimizer holds."""
    optimizer, trained = role.engine.optimizer, role.trained_parameters()
    if role.stage == 3:
        names = {id(p): name for name, p in trained}
        for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            flat = {MASTER: master.data} | _live_moments(role, master, step)
            offset = 0
            for p in parameters:
                part = p.ds_tensor.ds_numel
                start = min(role.world.rank * part, p.ds_numel)
                yield _cut(names[id(p)], start, min(part, p.ds_numel - start), flat, offset)
                offset += part
    elif role.stage in (1, 2):
        masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        flats = [{MASTER: master.data} | _live_moments(role, master, step) for master in masters]
        for name, p in trained:
            if (held := p._hp_mapping) is not None:
                place, mine = held.lp_fragment_address, held.hp_fragment_address
                yield _cut(name, place.start, place.numel, flats[held.param_group_index], mine.start)
    else:
        masters = [p for group in role.engine.basic_optimizer.param_groups for p in group["params"] if p.requires_grad]
        for (name, _), master in zip(trained, masters, strict=True):
            yield _cut(name, 0, master.numel(), {MASTER: master.data} | _live_moments(role, master, step), 0)


def reshard(role: Role, folder: Path, saved_stage: int) -> None:
    """Loads a trained role from the files of another number of processes or of another ZeRO stage. Every rank must call
    it. Raises UserError if the trained parameters are not the same, or the optimizer is swapped to NVMe."""
    optimizer = role.engine.optimizer
    if getattr(optimizer, "swap_optimizer", False):
        raise UserError(f"{role.name}: an optimizer on NVMe resumes on the saved number of processes and stage only")
    names = [name for name, _ in role.trained_parameters()]
    saved = SavedRole(folder, saved_stage, names)
    if wrong := sorted(saved.pieces.keys() ^ set(names)):
        raise UserError(f"{role.name}: trained parameters differ from the checkpoint's: {wrong[:3]}")
    if role.stage == 3:
        optimizer.checkpoint_event_prologue()  # lets go of gathered parameters, which would be stale
    for piece in _live_pieces(role, saved.step):
        saved.fill(piece)
    _refresh(role)
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(role.engine, counter, saved.model[counter])


@torch.no_grad()
def _refresh(role: Role) -> None:
    """Makes the network's weights those of the master weights, as after an optimizer step."""
    optimizer = role.engine.optimizer
    if role.stage == 3:
        for master, flat, parts in zip(
            optimizer.fp32_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups,
            strict=True,
        ):
            flat.data.copy_(master.data)
            for part, value in zip(parts, optimizer.unflatten(flat, parts), strict=True):
                part.data = value.data
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
    elif role.stage in (1, 2):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):  # stage 0 with bf16: masters beside the network
        for masters, live in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, p in zip(masters, live, strict=True):
                p.copy_(master)
