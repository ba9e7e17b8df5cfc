"""Which kernel computes attention: found by trying each one on the shapes of the network that will run.

PyTorch's kernels are chosen for the whole process, once (`prefer`), not call by call: entering `sdpa_kernel` costs 20
microseconds, and SDXL has 140 attentions a forward pass. What else runs in the process, such as a decoder with a head
size that the preferred kernel does not take, falls through to the next one in the order.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from models.errors import ModelError

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = (*KERNELS, "xformers")
# A kernel whose result is farther off than this share of the largest value is broken, not imprecise.
TOLERANCE = 0.05


class AttentionShape(NamedTuple):
    """What a kernel's limits depend on besides device and dtype."""

    head_size: int
    queries: int
    keys: int


class _Record(TorchFunctionMode):
    def __init__(self) -> None:
        self.shapes: set[AttentionShape] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            query, key = args[:2]
            self.shapes.add(AttentionShape(query.shape[-1], query.shape[-2], key.shape[-2]))
        return function(*args, **(kwargs or {}))


def attention_shapes(network: nn.Module, call: Callable[[nn.Module], object]) -> list[AttentionShape]:
    """The distinct shapes of a diffusers network's attentions, largest first.

    call: makes one forward pass of the network that it is given, a copy on the meta device: no memory, no time.
    """
    with torch.device("meta"):
        twin = type(network).from_config(network.config)
    with _Record() as record, torch.no_grad():
        call(twin)
    return sorted(record.shapes, reverse=True)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, N, heads, head size], as the projections give them: xformers' own layout, nothing is copied."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, N, heads, head size]; the transpositions are views."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def _reason(error: Exception, said: list[str]) -> str:
    """One line: what PyTorch warned of a kernel, else the error's first line and the first cause that it lists."""
    causes = [line.split(" (Triggered internally")[0] for line in said if "because" not in line]
    if causes:
        return causes[0]
    if "viable backend" in str(error):
        return "PyTorch has no such kernel for this device"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    listed = next((i for i, line in enumerate(lines) if line.endswith("because:")), len(lines))
    return ": ".join([lines[0].rstrip(":"), *lines[listed + 1 : listed + 2]])


def obstacle(name: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Runs one head of this shape through a kernel, forward and backward; None if that works, else why not."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (shape.queries, shape.keys, shape.keys)
    inputs = [torch.randn(1, n, 1, shape.head_size, generator=generator, device=device) for n in sizes]
    mine = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().float().requires_grad_() for x in mine]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with nullcontext() if name == "xformers" else sdpa_kernel(KERNELS[name]):
                result = (_xformers if name == "xformers" else _sdpa)(*mine)
            gradients = torch.autograd.grad(result.float().square().sum(), mine)
        except Exception as error:  # each library has its own types, and a missing one is a reason as well
            return _reason(error, [str(w.message) for w in said])
    with sdpa_kernel(SDPBackend.MATH):
        expected = _sdpa(*exact)
    pairs = zip((result, *gradients), (expected, *torch.autograd.grad(expected.square().sum(), exact)), strict=True)
    off = max(float((a.detach().float() - b.detach()).abs().max() / b.abs().max().detach()) for a, b in pairs)
    return None if off < TOLERANCE else f"its result is off by {off:.1%} of the largest value"


def preference(device: torch.device) -> tuple[str, ...]:
    """The order that "auto" tries. cuDNN's kernels are written for Hopper and newer; before, flash is the faster."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "flash", "efficient", "cudnn", "math"
    return "cudnn", "flash", "efficient", "math"


@cache
def choose(
    choice: str, shapes: tuple[AttentionShape, ...], dtype: torch.dtype, device: torch.device
) -> tuple[str, dict[str, str]]:
    """The kernel that will run, and for each other one why it does not. choice: "auto" or one of NAMES.

    Raises ModelError if the one that was asked for cannot run here.
    """
    obstacles = {}
    for name in NAMES:
        for shape in shapes:
            if why := obstacle(name, shape, dtype, device):
                obstacles[name] = f"{_words(shape)}: {why}"
                break
    if choice in obstacles:
        works = ", ".join(n for n in NAMES if n not in obstacles)
        where = f"{device.type}, {str(dtype).removeprefix('torch.')}"
        raise ModelError(
            f"network.attention={choice} cannot run here ({where}, {obstacles[choice]}): use auto or one of {works}"
        )
    # "math" runs everywhere, so the order always ends.
    name = next(n for n in preference(device) if n not in obstacles) if choice == "auto" else choice
    return name, {n: obstacles.get(n, "runs, but is not the one chosen") for n in NAMES if n != name}


def report(name: str, others: dict[str, str], shapes: list[AttentionShape], dtype: torch.dtype) -> list[str]:
    """Lines for the log: what runs, on which shapes, and why nothing else."""
    where = f"{str(dtype).removeprefix('torch.')}; {'; '.join(_words(shape) for shape in shapes)}"
    return [f"attention: {name} ({where})", *(f"attention: not {n}: {why}" for n, why in others.items())]


def _words(shape: AttentionShape) -> str:
    return f"head size {shape.head_size}, {shape.queries} queries x {shape.keys} keys"


def prefer(name: str, device: torch.device) -> AbstractContextManager:
    """While the context is open, attentions of the process take this kernel, or one behind it in the order if it cannot
    take them. Those before it are switched off: PyTorch ignores the order on a CPU."""
    order = preference(device)
    allowed = order[order.index(name) :] if name in KERNELS else order
    return sdpa_kernel([KERNELS[n] for n in allowed], set_priority=True)


def selected(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that PyTorch itself would now take for a shape."""
    sizes = (shape.queries, shape.keys, shape.keys)
    query, key, value = (torch.empty(1, 1, n, shape.head_size, dtype=dtype, device=device) for n in sizes)
    number = torch._fused_sdp_choice(query, key, value)
    return next((name for name, kernel in KERNELS.items() if int(kernel) == number), "none")


class AttentionProcessor:
    """diffusers' AttnProcessor2_0 for the plain attentions of a UNet, to the bit, without its division by one; with
    xformers, tensors stay in the layout that projections give them, and none of diffusers' three copies is made."""

    def __init__(self, xformers: bool):
        self.attend = _xformers if xformers else _sdpa
        self.masked = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            return self.masked(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        batch, queries, _ = hidden_states.shape
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states).view(batch, queries, attn.heads, -1)
        key, value = (f(seen).view(batch, seen.shape[1], attn.heads, -1) for f in (attn.to_k, attn.to_v))
        out = self.attend(query, key, value).reshape(batch, queries, -1)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def install(network: nn.Module, name: str) -> int:
    """Gives a UNet's plain attentions our processor; returns how many. Others (of pixels with their own normalisation,
    of two streams as in SD3) keep diffusers': for them `prefer` alone decides, and xformers is refused.

    Raises ModelError.
    """
    plain = [m for m in network.modules() if isinstance(m, Attention) and _is_plain(m)]
    if name == "xformers" and not plain:
        raise ModelError(
            f"network.attention=xformers is for UNets, not for {type(network).__name__}: use auto, cudnn or flash"
        )
    for attn in plain:
        attn.set_processor(AttentionProcessor(name == "xformers"))
    return len(plain)


def _is_plain(attn: Attention) -> bool:
    special = (attn.group_norm, attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attn.added_kv_proj_dim)
    return type(attn.processor) is AttnProcessor2_0 and all(part is None for part in special)
