"""DeepSpeed's internals: all that this trainer reads or changes beyond the public API, in one module.

Tested with DeepSpeed 0.19.8. pyproject.toml bounds the version on both sides, and a test fails outside of them. (What is
changed when an engine starts is in trainer.engine.initialize; when a process starts, in trainer.distributed.deepspeed_comm.)

Optimizer states have the same form for every ZeRO stage, in a live engine and in its files: pieces, which are the elements
[start, end) of a parameter with their master weights and Adam moments.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(optim|model)_states\.pt$")


class _FileWriter(TorchCheckpointEngine):
    def __init__(self, write: Callable[[object, Path], None]):
        super().__init__()
        self.write = write

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass  # `write` makes the folders of its files

    def save(self, state_dict: dict, path: str) -> None:
        self.write(state_dict, Path(path))


def write_files_with(engine: DeepSpeedEngine, write: Callable[[object, Path], None]) -> None:
    """Has the engine save its checkpoint files by `write(state, file)`, which makes missing folders and must not raise:
    DeepSpeed has collectives behind its saves."""
    engine.checkpoint_engine = _FileWriter(write)


def measures_norm(engine: DeepSpeedEngine) -> bool:
    """Whether every update measures the gradient norm, for `engine.get_global_grad_norm`. Plain AdamW (ZeRO 0 in float32)
    does not."""
    return hasattr(engine.optimizer, "_global_grad_norm")


def gradient_norm(engine: DeepSpeedEngine) -> Tensor | float:
    """Of the last update, before clipping; infinite if it is not finite, which some of DeepSpeed's optimizers call -1."""
    norm = engine.get_global_grad_norm()
    return norm.where(norm >= 0, torch.inf) if isinstance(norm, Tensor) else norm


@dataclass(frozen=True)
class Sharding:
    """How ZeRO-3 shards a parameter of `shape`: in pieces of `piece` elements, one per rank of `group`."""

    group: dist.ProcessGroup
    size: int
    rank: int
    shape: tuple[int, ...]
    piece: int


def sharding(parameter: nn.Parameter) -> Sharding | None:
    """None for a parameter that is not sharded."""
    if not hasattr(parameter, "ds_tensor"):
        return None
    size, rank = parameter.ds_zero_partition_world_size, parameter.ds_zero_partition_rank
    return Sharding(parameter.ds_process_group, size, rank, tuple(parameter.ds_shape), parameter.ds_tensor.ds_numel)


def shard(parameter: nn.Parameter) -> Tensor:
    """This rank's piece of a sharded parameter, flat; the last ranks' are padded."""
    return parameter.ds_tensor.data.view(-1)


def drop_gathered(parameter: nn.Parameter) -> None:
    """Drops the whole copy of a parameter that ZeRO-3 keeps gathered ("persistent"), which is stale once its shards have
    been written. The next forward pass gathers it again."""
    if parameter.data.numel() == parameter.ds_numel:
        parameter.partition()


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter on all ranks together."""
    return getattr(parameter, "ds_numel", parameter.numel())


class Sharder(deepspeed.zero.Init):
    """Shards parameters as ZeRO-3 does, but without the broadcast from rank 0: every rank reads its own part of a file."""

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()

    def shard(self, parameter: nn.Parameter) -> None:
        self._convert_to_zero_parameters([parameter])

    def finish(self) -> None:
        """As DeepSpeed does for a network that it shards itself; else the graphs of linear layers keep gathered weights."""
        if self.mem_efficient_linear:
            self._enable_mem_efficient_linear()


# Optimizer states of a live engine


@dataclass(frozen=True)
class Piece:
    """Elements [start, end) of the parameter `name`, counted flat. values: the master weights ("fp32") and Adam moments
    of these elements; views if they are a live engine's."""

    name: str
    start: int
    end: int
    values: dict[str, Tensor]


def _piece(name: str, start: int, numel: int, whole: dict[str, Tensor], offset: int) -> Piece:
    """whole: the optimizer's tensors, in which the piece begins at `offset`."""
    values = {key: value.view(-1).narrow(0, offset, numel) for key, value in whole.items()}
    return Piece(name, start, start + numel, values)


def _masters(engine: DeepSpeedEngine) -> list[Tensor]:
    """The tensors that this rank's AdamW updates: one per parameter at stage 0, one per group above."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return optimizer.fp32_partitioned_groups_flat
    if engine.zero_optimization_stage() > 0:
        return getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    return [p for group in engine.basic_optimizer.param_groups for p in group["params"] if p.requires_grad]


def live_pieces(
    engine: DeepSpeedEngine, trained: dict[str, nn.Parameter], step: Tensor | int | None = None
) -> Iterator[Piece]:
    """The master weights that this rank holds. trained: all trained parameters, in the network's order. step: the
    optimizer's step is set to it, and the pieces have Adam moments too, made if the optimizer has not stepped yet."""
    states = [{MASTER: master.data} for master in _masters(engine)]
    if step is not None:
        for master, state in zip(_masters(engine), states, strict=True):
            state.update(_moments(engine.basic_optimizer, master, step))
    if engine.zero_optimization_stage() == 3:
        names = {id(p): name for name, p in trained.items()}
        for parameters, state in zip(engine.optimizer.fp16_groups, states, strict=True):
            offset = 0
            for p in parameters:
                piece = p.ds_tensor.ds_numel
                start = min(p.ds_zero_partition_rank * piece, p.ds_numel)
                yield _piece(names[id(p)], start, min(piece, p.ds_numel - start), state, offset)
                offset += piece
    elif engine.zero_optimization_stage() > 0:
        for name, p in trained.items():
            if (held := p._hp_mapping) is not None:  # None: this rank updates no element of it
                place, offset = held.lp_fragment_address, held.hp_fragment_address.start
                yield _piece(name, place.start, place.numel, states[held.param_group_index], offset)
    else:
        for (name, p), state in zip(trained.items(), states, strict=True):
            yield _piece(name, 0, p.numel(), state, 0)


def _moments(optimizer: torch.optim.Optimizer, master: Tensor, step: Tensor | int) -> dict[str, Tensor]:
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


def swaps_to_nvme(engine: DeepSpeedEngine) -> bool:
    return getattr(engine.optimizer, "swap_optimizer", False)


@contextmanager
def masters_rewritten(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within the block `live_pieces` may be overwritten; then the network gets the weights of its masters, as after an
    update."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # drops gathered parameters, which would be stale
    yield
    with torch.no_grad():
        if stage == 3:
            _refresh_shards(optimizer)
        elif stage > 0:
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_groups"):  # bf16 at stage 0: masters beside the network
            for masters, live in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
                for master, p in zip(masters, live, strict=True):
                    p.copy_(master)


def _refresh_shards(optimizer: object) -> None:
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


# Optimizer states in an engine's files


class SavedEngine:
    """What the ranks of a checkpoint saved of one engine: `pieces` by parameter, and the optimizer's `step`.

    folder: the engine's files, which are mapped, not read. trained: the names of its trained parameters, in the network's
    order. Raises OSError, KeyError and whatever torch.load raises for a damaged file.
    """

    def __init__(self, folder: Path, stage: int, trained: list[str]):
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        self.step: Tensor | int = 0
        files: dict[str, dict[int, Path]] = {"optim": {}, "model": {}}
        for file in folder.iterdir():
            if match := RANK_FILE.search(file.name):
                files[match[2]][int(match[1])] = file
        self._model = _mapped(files["model"][0] if stage == 3 else folder / "mp_rank_00_model_states.pt")
        if stage == 0:
            cuts = self._stage_0(trained)
        else:
            optimizers = [_mapped(files["optim"][rank])["optimizer_state_dict"] for rank in range(len(files["optim"]))]
            cuts = self._stage_3(optimizers) if stage == 3 else self._stages_1_2(optimizers)
        for piece in cuts:
            self.pieces[piece.name].append(piece)

    def restore_counters(self, engine: DeepSpeedEngine) -> None:
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, self._model[name])

    def _values(self, master: Tensor, states: dict[int, dict], index: int) -> dict[str, Tensor]:
        """A master weight with its moments, which the optimizer does not have before the first update: zeros."""
        state = states.get(index)
        if state is None:
            return {MASTER: master} | {key: torch.zeros_like(master) for key in MOMENTS}
        self.step = state["step"]
        return {MASTER: master} | {key: state[key] for key in MOMENTS}

    def _stage_0(self, names: list[str]) -> Iterator[Piece]:
        """Everything is in rank 0's file, the masters in the network (fp32) or beside it (bf16)."""
        optimizer = self._model["optimizer"]
        if "fp32_groups" in optimizer:
            masters = [p for group in optimizer["fp32_groups"] for p in group]
            optimizer = optimizer["optimizer_state_dict"]
        else:
            masters = [self._model["module"][name] for name in names]
        for index, (name, master) in enumerate(zip(names, masters, strict=True)):
            yield _piece(name, 0, master.numel(), self._values(master, optimizer["state"], index), 0)

    def _stages_1_2(self, optimizers: list[dict]) -> Iterator[Piece]:
        """One flat tensor per group, cut anywhere: the parts of a parameter follow each other rank by rank."""
        seen: dict[str, int] = defaultdict(int)
        for saved in optimizers:
            for group, fragments in enumerate(saved["param_slice_mappings"]):
                master = saved["single_partition_of_fp32_groups"][group]
                state = self._values(master, saved["base_optimizer_state"]["state"], group)
                for name, place in fragments.items():
                    yield _piece(name, seen[name], place.numel, state, place.start)
                    seen[name] += place.numel

    def _stage_3(self, optimizers: list[dict]) -> Iterator[Piece]:
        """Every parameter is cut into equal parts, the last ones padded; a rank's parts follow each other group by group."""
        world = len(optimizers)
        for rank, saved in enumerate(optimizers):
            for group, shapes in enumerate(self._model["param_shapes"]):
                state = self._values(saved["fp32_flat_groups"][group], saved["optimizer_state_dict"]["state"], group)
                offset = 0
                for name, shape in shapes.items():
                    part = -(-shape.numel() // world)
                    start = min(rank * part, shape.numel())
                    yield _piece(name, start, min(part, shape.numel() - start), state, offset)
                    offset += part


def _mapped(file: Path) -> dict:
    # DeepSpeed pickles objects of its own classes in these; they are trusted as DeepSpeed's own loading trusts them.
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)
