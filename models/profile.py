"""What a network costs, measured on the meta device: parameters, saved activations, peaks, FLOP. No weights, no memory."""

import json
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.families import network_family
from models.settings import LoraSettings


@dataclass(frozen=True)
class Cost:
    """Of one sample, in bytes and FLOP (2 a multiply-accumulate).

    saved: activations that autograd keeps from forward to backward. peak: most memory of forward and backward at any
    moment, without the parameters and their gradients. forward_peak: the same of a forward pass without autograd.
    encoder_*: up to and with a UNet's middle block, which is what a GAN head on its features needs; 0 without one.
    trainable, frozen: elements of each parameter.
    """

    trainable: tuple[int, ...]
    frozen: tuple[int, ...]
    saved: int
    encoder_saved: int
    peak: int
    forward_peak: int
    forward_flops: float
    train_flops: float  # forward and backward, recomputation of checkpointing included
    encoder_flops: float  # forward

    @property
    def parameters(self) -> int:
        return sum(self.trainable) + sum(self.frozen)


class Saved:
    """Bytes of the unique storages that autograd saves inside the block, the given parameters' left out."""

    def __init__(self, parameters: list[Tensor]):
        self.ignored = {p.untyped_storage()._cdata for p in parameters}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def hooks(self) -> saved_tensors_hooks:
        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.ignored:
                self.storages[storage._cdata] = storage  # held, so that no other storage gets its address
            return tensor

        return saved_tensors_hooks(pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class Live(TorchDispatchMode):
    """Follows the bytes of all storages that operators inside the block make, and their highest sum. The given
    parameters, of which operators return views, are not counted."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata for p in parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def meta_network(config: dict, dtype: torch.dtype, rank: int = 0, targets: tuple[str, ...] = ()) -> ModelMixin:
    """A denoiser without weights, in training mode; with rank > 0 frozen but for LoRA matrices on the target layers."""
    with torch.device("meta"):
        network = network_family(config).network.from_config(config)
        if rank:
            network.requires_grad_(False)
            network.add_adapter(LoraSettings(rank=rank, targets=list(targets)).peft())
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.to(dtype)
    return network.train()


def inputs(network: ModelMixin, batch: int, latent_shape: tuple[int, int, int], tokens: int) -> tuple:
    """(args, kwargs) of a call of this network on its device, in its dtype."""
    config = {**network.config, "_class_name": type(network).__name__}
    like = {"device": network.device, "dtype": network.dtype}
    args, kwargs = network_family(config).example(config, batch, latent_shape, tokens, **like)
    return args, kwargs | {"return_dict": False}


@contextmanager
def fused_attention():
    """Attention as the fused kernels of a GPU do it. On the meta device PyTorch would take the plain one, which keeps the
    whole matrix of scores."""
    original = nn.functional.scaled_dot_product_attention

    def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        args = (query, key, value, dropout_p, is_causal)
        return torch.ops.aten._scaled_dot_product_flash_attention(*args, scale=scale)[0]

    nn.functional.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def cost(
    config: dict,
    latent_shape: tuple[int, int, int],
    tokens: int,
    dtype: torch.dtype,
    checkpointing: bool = False,
    rank: int = 0,
    targets: tuple[str, ...] = (),
    fused: bool = True,
) -> Cost:
    """Measures a denoiser of this configuration (its config.json). fused: attention never holds the matrix of scores (all kernels but math)."""
    plain = {k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"}
    key = json.dumps(plain, sort_keys=True, default=str)
    return _cost(key, tuple(latent_shape), tokens, dtype, checkpointing, rank, tuple(targets), fused)


@lru_cache(maxsize=32)
def _cost(key, latent_shape, tokens, dtype, checkpointing, rank, targets, fused) -> Cost:
    network = meta_network(json.loads(key), dtype, rank, targets)
    if checkpointing:
        network.enable_gradient_checkpointing()
    parameters = list(network.parameters())
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:  # gradients are counted elsewhere: ZeRO decides how many stay
        parameter.register_post_accumulate_grad_hook(_drop)
    with torch.device("meta"), fused_attention() if fused else nullcontext():
        args, kwargs = inputs(network, 1, latent_shape, tokens)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, Live(parameters) as quiet:
            network(*args, **kwargs)
        saved, at_middle = Saved(parameters), []
        middle = getattr(network, "mid_block", None)
        handle = middle and middle.register_forward_hook(lambda *_: at_middle.append(saved.bytes))
        with FlopCounterMode(display=False) as both, Live(parameters) as live:
            with saved.hooks():
                out = network(*args, **kwargs)[0]
            if handle:
                handle.remove()
            saved_bytes = saved.bytes
            saved.storages.clear()
            out.backward(torch.empty_like(out))
    by_module = counter.get_flop_counts()
    late = [f"{type(network).__name__}.{name}" for name in ("up_blocks", "conv_norm_out", "conv_out")]
    decoder = sum(sum(ops.values()) for name, ops in by_module.items() if _child_of(name, late))
    forward = float(counter.get_total_flops())
    return Cost(
        trainable=tuple(p.numel() for p in trained),
        frozen=tuple(p.numel() for p in network.parameters() if not p.requires_grad),
        saved=saved_bytes,
        encoder_saved=at_middle[0] if middle else 0,
        peak=live.peak,
        forward_peak=quiet.peak,
        forward_flops=forward,
        train_flops=float(both.get_total_flops()),
        encoder_flops=forward - decoder if middle else 0.0,
    )


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _child_of(name: str, parents: list[str]) -> bool:
    """Whether a FLOP counter's module name is one of the parents or, for a list of blocks, one of its members."""
    head, _, last = name.rpartition(".")
    return name in parents or (last.isdigit() and head in parents)


def saved_bytes(network: nn.Module, call: Callable[[], object]) -> int:
    """Bytes of activations that a call keeps for its backward pass."""
    saved = Saved(list(network.parameters()))
    with saved.hooks():
        call()
    return saved.bytes
