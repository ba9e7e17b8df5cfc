"""What a network costs, measured on the meta device, without weights: FLOP of its passes, and memory for activations."""

import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.families import network_family
from models.gan import Discriminator, feature_shape
from models.lora import peft_config
from models.settings import LoraSettings

NO_LORA = LoraSettings()


@dataclass(frozen=True)
class PassFlops:
    """FLOP of one sample's forward passes, 2 per multiply-accumulate.

    forward: the denoiser. encoder: the part of it up to the bottleneck, which the GAN head reads. head: the head alone.
    adapter: work of the LoRA matrices, as a share of the denoiser's.
    """

    forward: float
    encoder: float = 0.0
    head: float = 0.0
    adapter: float = 0.0


@dataclass(frozen=True)
class NetworkMemory:
    """Parameters, and bytes of activations of one sample.

    trainable, frozen: elements of each parameter. saved: activations that autograd keeps from forward to backward.
    encoder_saved: those up to the bottleneck, which the GAN head needs; 0 for a network without one. peak: the maximum
    over forward and backward pass, without parameters and their gradients. forward_peak: the maximum over a forward pass
    without autograd.
    """

    trainable: tuple[int, ...]
    frozen: tuple[int, ...]
    saved: int
    encoder_saved: int
    peak: int
    forward_peak: int

    @property
    def parameters(self) -> int:
        return sum(self.trainable) + sum(self.frozen)


def count_flops(call: Callable[[], object]) -> float:
    """FLOP of the matrix products, convolutions and attentions that a call executes, backward passes and recomputation
    included. Not counted: flash attention on a CPU, xformers."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _cached(function: Callable) -> Callable:
    """Remembers results by the printed arguments, since configurations are not hashable."""
    results: dict[str, object] = {}

    @wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        key = repr((args, kwargs))
        if key not in results:
            results[key] = function(*args, **kwargs)
        return results[key]

    return call


@_cached
def pass_flops(
    config: dict, latent_shape: tuple[int, int, int], tokens: int, gan: bool = False, lora: LoraSettings = NO_LORA
) -> PassFlops:
    """Counts the passes of a denoiser with this configuration (its config.json). Raises ModelError for an unknown network
    and, with the GAN term, for one that the head cannot read."""

    @torch.no_grad()
    def count(module: nn.Module, *args: object, **kwargs: object) -> float:
        return count_flops(lambda: module(*args, **kwargs))

    network = meta_network(config)
    args, kwargs = inputs(network, 1, latent_shape, tokens)
    forward, encoder, head, adapter = count(network, *args, **kwargs), 0.0, 0.0, 0.0
    if gan:
        with torch.device("meta"):
            discriminator = Discriminator(network, latent_shape, seed=0)
            head = count(discriminator.head, torch.empty(1, *feature_shape(network, latent_shape)))
        encoder = count(discriminator, *args, with_logits=True, decoder="skip", **kwargs) - head
    if lora.rank:
        adapter = count(meta_network(config, lora=lora), *args, **kwargs) / forward - 1
    return PassFlops(forward, encoder, head, adapter)


@_cached
def network_memory(
    config: dict,
    latent_shape: tuple[int, int, int],
    tokens: int,
    dtype: torch.dtype,
    checkpointing: bool = False,
    lora: LoraSettings = NO_LORA,
    fused: bool = True,
) -> NetworkMemory:
    """Measures a denoiser with this configuration (its config.json). fused: the attention kernel does not keep the matrix
    of scores, as all but the math kernel."""
    network = meta_network(config, dtype, lora)
    if checkpointing:
        network.enable_gradient_checkpointing()
    parameters = list(network.parameters())
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:  # how long gradients live is up to ZeRO, see trainer.planner.memory
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    saved, encoder_saved = SavedActivations(parameters), 0

    def at_bottleneck(*_: object) -> None:
        nonlocal encoder_saved
        encoder_saved = saved.bytes

    with torch.device("meta"), _fused_attention() if fused else nullcontext():
        args, kwargs = inputs(network, 1, latent_shape, tokens)
        with torch.no_grad(), PeakMemory(parameters) as without_autograd:
            network(*args, **kwargs)
        bottleneck = getattr(network, "mid_block", None)
        hook = bottleneck.register_forward_hook(at_bottleneck) if bottleneck is not None else None
        # No FLOP counter here: its hooks would keep recomputed activations alive.
        with PeakMemory(parameters) as both:
            with saved.hooks():
                out = network(*args, **kwargs)[0]
            if hook is not None:
                hook.remove()  # checkpointing runs the block once more
            saved_bytes = saved.bytes
            saved.storages.clear()
            out.backward(torch.empty_like(out))
    return NetworkMemory(
        trainable=tuple(p.numel() for p in trained),
        frozen=tuple(p.numel() for p in parameters if not p.requires_grad),
        saved=saved_bytes,
        encoder_saved=encoder_saved,
        peak=both.peak,
        forward_peak=without_autograd.peak,
    )


@_cached
def head_parameters(config: dict, latent_shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Elements of each parameter of the GAN head on a denoiser. Raises ModelError for one that it cannot read."""
    network = meta_network(config)
    with torch.device("meta"):
        return tuple(p.numel() for p in Discriminator(network, latent_shape, seed=0).head.parameters())


@_cached
def layer_names(config: dict) -> set[str]:
    """The names of a denoiser's linear and convolution layers, as its weight files tell them."""
    named = meta_network(config).named_parameters()
    return {name.removesuffix(".weight") for name, p in named if name.endswith(".weight") and p.dim() in (2, 4)}


@_cached
def encoder_parameters(config: dict) -> int:
    """Elements of a UNet's parameters up to the bottleneck: all but those of the decoder."""
    network = meta_network(config)
    decoder = {
        id(p) for part in (network.up_blocks, network.conv_norm_out, network.conv_out) for p in part.parameters()
    }
    return sum(p.numel() for p in network.parameters() if id(p) not in decoder)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def meta_network(config: dict, dtype: torch.dtype = torch.float32, lora: LoraSettings = NO_LORA) -> ModelMixin:
    """A denoiser without weights, in training mode; with LoRA all but the adapters is frozen."""
    with torch.device("meta"):
        network = network_family(config).network.from_config(config)
        if lora.rank:
            network.requires_grad_(False)
            network.add_adapter(peft_config(lora))
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.to(dtype)
    return network.train()


def inputs(network: ModelMixin, batch: int, latent_shape: tuple[int, int, int], tokens: int) -> tuple:
    """(args, kwargs) of a call of this network on its device, in its dtype."""
    config = {**network.config, "_class_name": type(network).__name__}
    like = {"device": network.device, "dtype": network.dtype}
    args, kwargs = network_family(config).example(config, batch, latent_shape, tokens, **like)
    return args, kwargs | {"return_dict": False}


class SavedActivations:
    """Bytes of the distinct storages that autograd saves in the block, without those of the given parameters."""

    def __init__(self, parameters: list[Tensor]):
        self.ignored = {p.untyped_storage()._cdata for p in parameters}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def hooks(self) -> saved_tensors_hooks:
        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.ignored:
                self.storages[storage._cdata] = storage  # kept alive, so that its address is not reused
            return tensor

        return saved_tensors_hooks(pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of all live storages that operators in the block allocate, and their peak. The given parameters, of
    which some operators return views, do not count."""

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
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def _fused_attention():
    """Attention as a GPU's fused kernels compute it. On the meta device PyTorch would take the plain kernel, which keeps
    the whole matrix of scores."""
    original = nn.functional.scaled_dot_product_attention

    def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        args = (query, key, value, dropout_p, is_causal)
        return torch.ops.aten._scaled_dot_product_flash_attention(*args, scale=scale)[0]

    nn.functional.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original
