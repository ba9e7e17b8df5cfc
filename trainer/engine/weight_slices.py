"""Weights of networks under DeepSpeed: every rank reads, keeps and averages only the slices that it owns."""

import copy
import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_set_local_fp32_param
from torch import Tensor, nn

from models.errors import ModelError
from models.files import weight_files
from models.lora import adapter_parameters, base_key
from models.tensorfile import TensorFile
from trainer.distributed.world import World
from trainer.engine.deepspeed_internals import MASTER, Sharder, drop_gathered, live_pieces, shard, sharding


class Slice:
    """The part of one parameter that this rank owns: its elements [start, end), counted flat.

    A parameter is cut into pieces of `piece` elements, one per rank; the last ones are shorter or empty. Under ZeRO-3 these
    are DeepSpeed's shards, over the ranks of the parameter's group (all, or a node's), and all that a rank holds. Below
    ZeRO-3 every rank has the whole parameter; its owner reads it from files and averages it.
    """

    def __init__(self, key: str, parameter: nn.Parameter, world: World):
        self.key, self.parameter = key, parameter
        cut = sharding(parameter)
        self.sharded = cut is not None
        self.group, self.size, rank = (cut.group, cut.size, cut.rank) if cut else (None, world.size, world.rank)
        self.shape = cut.shape if cut else tuple(parameter.shape)
        self.numel = math.prod(self.shape)
        self.piece = cut.piece if cut else -(-self.numel // world.size)
        self.start, self.end = min(rank * self.piece, self.numel), min((rank + 1) * self.piece, self.numel)

    @property
    def tensor(self) -> Tensor:
        """The owned weights, flat: live, or a copy if the parameter's memory layout is not its logical order."""
        if self.sharded:
            return shard(self.parameter)[: self.end - self.start]
        return self.parameter.data.reshape(-1)[self.start : self.end]

    def padded(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`value` padded to a full piece, on the parameter's device."""
        piece = torch.zeros(self.piece, dtype=dtype, device=self.parameter.device)
        piece[: len(value)].copy_(value, non_blocking=True)
        return piece

    def write(self, value: Tensor) -> None:
        """Copies the owned elements, flat, into the live weights. Below ZeRO-3 every rank must call it: the parameter is
        assembled from all ranks' elements."""
        if self.sharded:
            self.tensor.copy_(value, non_blocking=True)
            drop_gathered(self.parameter)
            return
        if self.size == 1:
            self.parameter.data.copy_(value.view(self.shape), non_blocking=True)
            return
        whole = torch.empty(self.size * self.piece, dtype=self.parameter.dtype, device=self.parameter.device)
        dist.all_gather_into_tensor(whole, self.padded(value, whole.dtype))
        self.parameter.data.copy_(whole[: self.numel].view(self.shape))

    def gather(self, value: Tensor, dtype: torch.dtype, world: World) -> Tensor | None:
        """The whole parameter, assembled from every rank's `value`, in host memory on rank 0; None on the others."""
        if self.size == 1:
            return value.to(dtype).to("cpu", copy=True).view(self.shape)
        if dist.get_global_rank(self.group or dist.group.WORLD, 0) != 0:
            return None  # a node's own copy of the weights; rank 0's node has one too
        piece = self.padded(value, dtype)
        parts = [torch.empty_like(piece) for _ in range(self.size)] if world.main else None
        dist.gather(piece, parts, dst=0, group=self.group)
        return torch.cat(parts)[: self.numel].view(self.shape).cpu() if world.main else None


@contextmanager
def open_folder(shapes: dict[str, tuple[int, ...]], folder: Path, variant: str = ""):
    """The open files of a weights folder by key; of its variant, if it has that. Raises ModelError unless the folder has
    exactly these keys and shapes."""
    files = []
    try:
        for file in weight_files(folder, variant):
            files.append(TensorFile(file))
        found = {key: file for file in files for key in file.shapes}
        missing, unexpected = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
        if missing or unexpected:
            raise ModelError(f"{folder}: does not fit the network: missing {missing[:3]}, unexpected {unexpected[:3]}")
        for key, shape in shapes.items():
            here = found[key]
            if here.shapes[key] != shape:
                raise ModelError(f"{here.file}: {key} has shape {here.shapes[key]}, the network has {shape}")
        yield found
    finally:
        for file in files:
            file.close()


class Weights:
    """All weights of a network, or those of its LoRA adapter, as slices.

    network: or an adapter's parameters by their keys in files. variant: which weight files to read in folders that have
    it. constants: persistent buffers, which never change and which every rank holds. `values` below are lists of tensors,
    one per slice: this rank's elements, flat.
    """

    def __init__(self, network: nn.Module | dict[str, nn.Parameter], world: World, variant: str = ""):
        self.world, self.variant = world, variant
        whole = isinstance(network, nn.Module)
        parameters = dict(network.named_parameters()) if whole else network
        self.slices = [Slice(key, parameter, world) for key, parameter in parameters.items()]
        self.constants = _constants(network) if whole else {}

    def with_slices(self, slices: list[Slice]) -> "Weights":
        """The same weights in other slices."""
        other = copy.copy(self)
        other.slices = slices
        return other

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {s.key: s.shape for s in self.slices} | {key: tuple(b.shape) for key, b in self.constants.items()}

    def local(self) -> list[Tensor]:
        """The owned weights, live where `Slice.tensor` is."""
        return [s.tensor for s in self.slices]

    def host_buffers(self, pinned: bool) -> list[Tensor]:
        """Host memory for the owned weights, in one block: each call of the pinning costs time."""
        dtype = self.slices[0].parameter.dtype
        block = torch.empty(sum(s.end - s.start for s in self.slices), dtype=dtype, pin_memory=pinned)
        return list(block.split([s.end - s.start for s in self.slices]))

    def read(self, folder: Path, out: list[Tensor] | None = None) -> list[Tensor]:
        """Reads the owned part of a weights folder, which must have exactly the network's keys and shapes.

        No rank reads or holds more than its own part. out: host tensors to fill; default: new ones in the live dtype. The
        live weights stay as they are. Raises ModelError.
        """
        out = self.host_buffers(pinned=False) if out is None else out
        with open_folder(self.shapes, folder, self.variant) as files:
            for s, value in zip(self.slices, out, strict=True):
                value.copy_(files[s.key].read(s.key, s.start, s.end))
        return out

    @torch.no_grad()
    def write(self, values: list[Tensor]) -> None:
        """Overwrites the live weights. Every rank must call it."""
        for s, value in zip(self.slices, values, strict=True):
            s.write(value)
        if self.slices[0].sharded and self.slices[0].tensor.is_cuda:
            # DeepSpeed gathers on its own stream, which does not wait for this one: it would gather a mixture.
            torch.cuda.current_stream().synchronize()

    def gather(self, values: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor] | None:
        """The whole state dict in host memory on rank 0, from every rank's values; None on the others. Every rank must call
        it; none but rank 0 holds more than one whole parameter."""
        whole = {s.key: s.gather(v, dtype, self.world) for s, v in zip(self.slices, values, strict=True)}
        return whole | self._constants(dtype) if self.world.main else None

    def copy(self, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """A copy of the live weights as a whole state dict in host memory on rank 0; None on the others. Every rank must
        call it: ZeRO-3 gathers."""
        if self.slices[0].sharded:
            return self.gather(self.local(), dtype)
        if not self.world.main:
            return None
        whole = {s.key: s.parameter.detach().to(dtype).to("cpu", copy=True).contiguous() for s in self.slices}
        return whole | self._constants(dtype)

    def _constants(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            key: b.to(dtype if b.is_floating_point() else b.dtype).to("cpu", copy=True)
            for key, b in self.constants.items()
        }

    def load_masters(self, folder: Path, engine: DeepSpeedEngine) -> int:
        """Sets the optimizer's float32 master weights from the folder's tensors that are more exact than bfloat16, since
        DeepSpeed made the masters from bfloat16 weights. Returns the number of these tensors."""
        with open_folder(self.shapes, folder, self.variant) as files:
            exact = [s for s in self.slices if files[s.key].dtypes[s.key] != torch.bfloat16]
            if self.slices[0].sharded:
                for s in exact:
                    value = s.padded(files[s.key].read(s.key, s.start, s.end), torch.float32)
                    safe_set_local_fp32_param(s.parameter, value)
                return len(exact)
            trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
            keys = {id(s.parameter): s.key for s in exact}
            for piece in live_pieces(engine, trained):
                if key := keys.get(id(trained[piece.name])):
                    piece.values[MASTER].copy_(files[key].read(key, piece.start, piece.end))
        return len(exact)


def _constants(network: nn.Module) -> dict[str, Tensor]:
    parameters = {key for key, _ in network.named_parameters()}
    return {key: value for key, value in network.state_dict().items() if key not in parameters}


def load_folder(
    network: nn.Module,
    folder: Path,
    world: World,
    dtype: torch.dtype,
    config: dict,
    group: object = None,
    variant: str = "",
) -> int:
    """Fills a network on the meta device from a folder that must fit exactly; returns the number of tensors.

    A rank reads its own slices only. At stage 3 of `config` (DeepSpeed's) they are all that it ever holds, besides one
    whole parameter at a time. Below, ranks assemble each parameter once, in its final dtype and place. Parameters that are
    not on the meta device (an adapter, other additions) are kept. group: the processes that share one sharded copy;
    default: all. Raises ModelError.
    """
    sharder = None
    if config["zero_optimization"]["stage"] == 3:
        sharder = Sharder(config_dict_or_path=config, dtype=dtype, data_parallel_group=group)
    owners = [
        (module, name, base_key(f"{prefix}.{name}" if prefix else name))
        for prefix, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    constants = _constants(network)
    shapes = {key: tuple(getattr(module, name).shape) for module, name, key in owners}
    shapes |= {key: tuple(buffer.shape) for key, buffer in constants.items()}
    with open_folder(shapes, folder, variant) as files, torch.no_grad():
        for module, name, key in owners:
            empty = torch.empty(shapes[key], dtype=dtype, device=world.device)
            parameter = nn.Parameter(empty, getattr(module, name).requires_grad)
            setattr(module, name, parameter)
            if sharder is not None:
                sharder.shard(parameter)
            s = Slice(key, parameter, world)
            s.write(files[key].read(key, s.start, s.end))
        for buffer in network.buffers():  # DeepSpeed does not move them if the parameters are sharded
            buffer.data = buffer.data.to(world.device)
        for key, buffer in _constants(network).items():
            buffer.copy_(files[key].read(key, 0, buffer.numel()).view(buffer.shape))
    if sharder is not None:
        sharder.finish()
    return len(shapes)


def load_adapter(network: nn.Module, folder: Path, world: World) -> None:
    """Overwrites the adapter of a network that is no engine yet with that of a LoRA folder, which must fit exactly. Every
    rank must call it. Raises ModelError."""
    weights = Weights(adapter_parameters(network), world)
    weights.write(weights.read(folder))
