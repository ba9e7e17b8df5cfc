"""Weights in and out of roles: every rank reads, keeps and averages only the slices that it owns."""

import math
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_set_local_fp32_param
from torch import Tensor, nn

from models.errors import ModelError
from models.lora import adapter_parameters, base_key
from models.pipeline import weight_files
from models.tensorfile import TensorFile
from trainer.distributed.world import World


class Slice:
    """The part of one parameter that this rank owns: its elements [start, end), flat.

    A parameter of n elements is cut into pieces of `piece` elements, one a rank, the last ones shorter or empty. Under
    ZeRO-3 these are DeepSpeed's pieces, over the ranks of the parameter's own group (all, or a node's), and all that is
    in memory. Below it every rank has the whole parameter, and owning says who reads it from a file and who averages it.
    """

    def __init__(self, key: str, parameter: nn.Parameter, world: World):
        self.key, self.parameter = key, parameter
        self.sharded = hasattr(parameter, "ds_tensor")
        if self.sharded:
            self.group, self.size = parameter.ds_process_group, parameter.ds_zero_partition_world_size
            rank, self.shape, self.piece = (
                parameter.ds_zero_partition_rank, tuple(parameter.ds_shape), parameter.ds_tensor.ds_numel
            )  # fmt: skip
        else:
            self.group, self.size, rank, self.shape = None, world.size, world.rank, tuple(parameter.shape)
            self.piece = -(-parameter.numel() // world.size)
        self.numel = math.prod(self.shape)
        self.start, self.end = min(rank * self.piece, self.numel), min((rank + 1) * self.piece, self.numel)

    @property
    def tensor(self) -> Tensor:
        """The owned weights, flat: the live ones, or a copy where a parameter does not lie in memory in its order."""
        if self.sharded:
            return self.parameter.ds_tensor.data.view(-1)[: self.end - self.start]
        return self.parameter.data.reshape(-1)[self.start : self.end]

    def padded(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`value` in a piece of full length, on the parameter's device."""
        piece = torch.zeros(self.piece, dtype=dtype, device=self.parameter.device)
        piece[: len(value)].copy_(value, non_blocking=True)
        return piece

    def write(self, value: Tensor) -> None:
        """Copies the owned elements, flat, into the live weights. Below ZeRO-3 every rank must call it: the parameter
        is put together from all."""
        if self.sharded:
            self.tensor.copy_(value, non_blocking=True)
            if self.parameter.data.numel() == self.numel:
                # A parameter that ZeRO-3 keeps gathered ("persistent") has another copy, now stale: let go of it, and
                # the next forward pass gathers it again.
                self.parameter.partition()
            return
        if self.size == 1:
            self.parameter.data.copy_(value.view(self.shape), non_blocking=True)
            return
        whole = torch.empty(self.size * self.piece, dtype=self.parameter.dtype, device=self.parameter.device)
        dist.all_gather_into_tensor(whole, self.padded(value, whole.dtype))
        self.parameter.data.copy_(whole[: self.numel].view(self.shape))

    def gather(self, value: Tensor, dtype: torch.dtype, world: World) -> Tensor | None:
        """Every rank's `value` put together as the whole parameter in host memory on rank 0; None on the others."""
        if self.size == 1:
            return value.to(dtype).to("cpu", copy=True).view(self.shape)
        if dist.get_global_rank(self.group or dist.group.WORLD, 0) != 0:
            return None  # another node's copy
        piece = self.padded(value, dtype)
        parts = [torch.empty_like(piece) for _ in range(self.size)] if world.main else None
        dist.gather(piece, parts, dst=0, group=self.group)
        return torch.cat(parts)[: self.numel].view(self.shape).cpu() if world.main else None


@contextmanager
def open_folder(shapes: dict[str, tuple[int, ...]], folder: Path, variant: str = ""):
    """The files of a weights folder (of the variant, if it has them) by key, if it holds exactly these keys and shapes.
    Raises ModelError."""
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
    """All weights of a network, as slices; `constants` are its persistent buffers, which never change and which every
    rank holds. Of a LoRA role the weights are the adapter's, a dictionary of parameters by their keys in files. `values` below are lists of tensors, one a slice: this rank's elements, flat. variant: of weight files, in
    folders that have it."""

    def __init__(self, network: nn.Module | dict[str, nn.Parameter], world: World, variant: str = ""):
        self.world, self.variant = world, variant
        whole = isinstance(network, nn.Module)
        parameters = dict(network.named_parameters()) if whole else network
        self.slices = [Slice(key, parameter, world) for key, parameter in parameters.items()]
        self.constants = _constants(network) if whole else {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {s.key: s.shape for s in self.slices} | {key: tuple(b.shape) for key, b in self.constants.items()}

    def local(self) -> list[Tensor]:
        """The owned weights: live where `Slice.tensor` is."""
        return [s.tensor for s in self.slices]

    def host_buffers(self, pinned: bool) -> list[Tensor]:
        """Room for the owned weights in host memory: one block, since pinning costs by the call."""
        dtype = self.slices[0].parameter.dtype
        block = torch.empty(sum(s.end - s.start for s in self.slices), dtype=dtype, pin_memory=pinned)
        return list(block.split([s.end - s.start for s in self.slices]))

    def read(self, folder: Path, out: list[Tensor] | None = None) -> list[Tensor]:
        """The owned part of a weights folder, strictly: every key of the network and no other, every shape.

        No rank reads or holds more than its own part. out: host tensors to fill; else new ones are made, in the live
        dtype. Live weights are left as they are. Raises ModelError.
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
            # DeepSpeed gathers on a stream of its own that does not wait for this one: it would gather a mixture.
            torch.cuda.current_stream().synchronize()

    def gather(self, values: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor] | None:
        """The whole state dict in host memory on rank 0, from every rank's values; None on the others, which hold one
        parameter at a time. Every rank must call it."""
        whole = {s.key: s.gather(v, dtype, self.world) for s, v in zip(self.slices, values, strict=True)}
        return whole | self._constants(dtype) if self.world.main else None

    def copy(self, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """A copy of the live weights as a whole state dict in host memory on rank 0, None on the others. Every rank
        must call it: under ZeRO-3 it gathers."""
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

    def load_masters(self, folder: Path, optimizer: object) -> int:
        """Sets the float32 weights of DeepSpeed's optimizer from the folder, where that is more exact than the bfloat16
        ones that DeepSpeed made them from. Returns the number of tensors."""
        exact, whole = 0, {}
        for live, masters in zip(
            getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False
        ):
            whole |= {id(p): m for p, m in zip(live, masters, strict=True)}  # stage 0: every rank has every master
        with open_folder(self.shapes, folder, self.variant) as files:
            for s in self.slices:
                file = files[s.key]
                if file.dtypes[s.key] == torch.bfloat16:
                    continue
                exact += 1
                if (master := whole.get(id(s.parameter))) is not None:
                    master.data.copy_(file.read(s.key, 0, s.numel).view(s.shape))
                elif s.sharded:
                    value = s.padded(file.read(s.key, s.start, s.end), torch.float32)
                    safe_set_local_fp32_param(s.parameter, value)
                elif (
                    mapping := s.parameter._hp_mapping
                ) is not None:  # None: no element of it is this rank's to update
                    part = mapping.lp_fragment_address
                    mapping.hp_fragment.data.copy_(file.read(s.key, part.start, part.start + part.numel))
        return exact


def _constants(network: nn.Module) -> dict[str, Tensor]:
    parameters = {key for key, _ in network.named_parameters()}
    return {key: value for key, value in network.state_dict().items() if key not in parameters}


class _Rows(deepspeed.zero.Init):
    """DeepSpeed's partitioning of parameters, without its broadcast: every rank reads its own part from the file."""

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def load_folder(
    network: nn.Module,
    folder: Path,
    world: World,
    dtype: torch.dtype,
    config: dict,
    group: object = None,
    variant: str = "",
) -> int:
    """Gives a network on the meta device its weights, from a folder that fits exactly; returns the number of tensors.

    A rank reads its own slices only. At stage 3 of `config` (DeepSpeed's; group: the processes that share one copy, None
    for all) they are all it ever holds, besides one parameter at a time; below, ranks put each parameter together, once,
    in its final dtype and place. Parameters that are not on the meta device (an adapter, other additions) are kept as
    they are. Raises ModelError.
    """
    init = None
    if config["zero_optimization"]["stage"] == 3:
        init = _Rows(config_dict_or_path=config, dtype=dtype, data_parallel_group=group)
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
            if init is not None:
                init._convert_to_zero_parameters([parameter])
            s = Slice(key, parameter, world)
            s.write(files[key].read(key, s.start, s.end))
        for buffer in network.buffers():  # which DeepSpeed leaves where they are if the parameters are sharded
            buffer.data = buffer.data.to(world.device)
        for key, buffer in _constants(network).items():
            buffer.copy_(files[key].read(key, 0, buffer.numel()).view(buffer.shape))
    if init is not None and init.mem_efficient_linear:
        # As DeepSpeed does for a network that it partitions itself: else a linear layer's graph keeps the gathered weight.
        init._enable_mem_efficient_linear()
    return len(shapes)


def start_from(network: nn.Module, folder: Path, world: World) -> None:
    """Overwrites the adapter of a network, which no engine has yet, with a LoRA folder's, strictly. Every rank must call it.
    Raises ModelError."""
    weights = Weights(adapter_parameters(network), world)
    weights.write(weights.read(folder))
