"""Choice of the attention kernel, by trying kernels on the network's own attentions until one works.

The kernel is chosen once for the whole process (`prefer_kernel`), not per call: entering `sdpa_kernel` costs 20
microseconds, and SDXL has 140 attentions per forward pass. Other attentions of the process, such as a decoder's with a
head size that the preferred kernel does not support, fall back to the next kernel in the order.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
# A kernel with a larger error, relative to the largest value, is broken and not just imprecise.
TOLERANCE = 0.05
_SDPA = F.scaled_dot_product_attention  # PyTorch's own, also while `prefer_kernel` has a wrapper in its place
log = logging.getLogger("disback")


class AttentionShape(NamedTuple):
    """What decides, with device and dtype, whether a kernel supports an attention: its sizes, and how query, key and value
    lie in memory (the strides of each [B, heads, N, head size])."""

    head_size: int
    queries: int
    keys: int
    batch: int
    heads: int
    strides: tuple[tuple[int, ...], ...]


class _ShapeRecorder(TorchFunctionMode):
    def __init__(self) -> None:
        self.shapes: set[AttentionShape] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is _SDPA:
            query, key = args[:2]
            batch, heads, queries, head_size = query.shape
            strides = tuple(x.stride() for x in args[:3])
            self.shapes.add(AttentionShape(head_size, queries, key.shape[-2], batch, heads, strides))
        return function(*args, **(kwargs or {}))


def attention_shapes(network: nn.Module, call: Callable[[nn.Module], object]) -> list[AttentionShape]:
    """The distinct attention shapes of a diffusers network, largest first.

    call: runs one forward pass of the network passed to it, a copy on the meta device: no memory, no time. A batch of two
    has the strides of a larger one; that of a single sample is a special case for some kernels.
    """
    with torch.device("meta"):
        twin = type(network).from_config(network.config)
    with _ShapeRecorder() as recorder, torch.no_grad():
        call(twin)
    return sorted(recorder.shapes, reverse=True)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in [B, N, heads, head size], the layout of the projections and of xformers: nothing is copied."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in [B, N, heads, head size]; the transpositions are views."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def _reason(error: Exception, warned: list[str]) -> str:
    """One line: PyTorch's first warning about a kernel, else the error's first line and first listed cause."""
    said = [line.split(" (Triggered internally")[0] for line in warned if "because" not in line]
    causes = [line for line in said if "runtime disabled" not in line]  # of the kernels that were not asked for
    if causes:
        return causes[0]
    if "viable backend" in str(error):
        return "PyTorch has no such kernel for this device"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    listed = next((i for i, line in enumerate(lines) if line.endswith("because:")), len(lines))
    return ": ".join([lines[0].rstrip(":"), *lines[listed + 1 : listed + 2]])


def try_kernel(name: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Runs a kernel on an attention as the network has it, forward and backward. Returns None if it works, else the reason."""
    generator = torch.Generator(device).manual_seed(0)
    tested = []
    for length, strides in zip((shape.queries, shape.keys, shape.keys), shape.strides, strict=True):
        size = (shape.batch, shape.heads, length, shape.head_size)
        x = torch.empty_strided(size, strides, dtype=dtype, device=device)
        tested.append(x.normal_(generator=generator).requires_grad_())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with nullcontext() if name == "xformers" else sdpa_kernel(KERNELS[name]):
                result = (_xformers if name == "xformers" else _sdpa)(*(x.transpose(1, 2) for x in tested))
            # As in the network, the heads become one dimension again before anything else sees them.
            gradients = torch.autograd.grad(result.flatten(2).float().square().sum(), tested)
        except Exception as error:  # libraries raise different types, and a missing library is a reason too
            return _reason(error, [str(w.message) for w in warned])
    found = result.transpose(1, 2), *gradients
    # Plain arithmetic keeps a matrix of queries x keys for each head: the first and the last head are enough to compare.
    off = max(_error(tested, found, at) for at in ((0, 0), (-1, -1)))
    return None if off < TOLERANCE else f"its result is off by {off:.1%} of the largest value"


def _error(inputs: list[Tensor], found: tuple[Tensor, ...], at: tuple[int, int]) -> float:
    """The largest difference of one head's result and gradients from plain float32 arithmetic, relative to the largest value."""
    exact = [x.detach()[at][None, None].float().requires_grad_() for x in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*exact)
    wanted = expected, *torch.autograd.grad(expected.square().sum(), exact)
    pairs = zip((x.detach()[at].float() for x in found), (x.detach()[0, 0] for x in wanted), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def kernel_order(device: torch.device) -> tuple[str, ...]:
    """The order of "auto". cuDNN's kernels are written for Hopper and newer; on older GPUs flash is faster."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "flash", "efficient", "cudnn", "math"
    return "cudnn", "flash", "efficient", "math"


@cache
def choose_kernel(
    choice: str, shapes: tuple[AttentionShape, ...], dtype: torch.dtype, device: torch.device
) -> tuple[str, dict[str, str]]:
    """The kernel to use, and the reasons against those that were tried before it. choice: "auto", the first in the order that
    works, or one of NAMES.

    Raises ModelError if the chosen kernel cannot run here.
    """
    failures: dict[str, str] = {}
    for name in kernel_order(device) if choice == "auto" else (choice,):  # "math" runs everywhere
        reason = _problem(name, shapes, dtype, device)
        if reason is None:
            return name, failures
        failures[name] = reason
    works = ", ".join(n for n in NAMES if n not in failures and _problem(n, shapes, dtype, device) is None)
    where = f"{device.type}, {str(dtype).removeprefix('torch.')}"
    raise ModelError(f"network.attention={choice} cannot run here ({where}, {reason}): use auto or one of {works}")


def _problem(name: str, shapes: tuple[AttentionShape, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a kernel cannot run one of the attentions; None if it runs them all."""
    for shape in shapes:
        if reason := try_kernel(name, shape, dtype, device):
            return f"{_describe(shape)}: {reason}"
    return None


def kernel_report(name: str, others: dict[str, str], shapes: list[AttentionShape], dtype: torch.dtype) -> list[str]:
    """Log lines: the chosen kernel with its shapes, and the reasons against those before it."""
    described = dict.fromkeys(_describe(shape) for shape in shapes)  # some differ in their strides alone
    where = f"{str(dtype).removeprefix('torch.')}; {'; '.join(described)}"
    return [f"attention: {name} ({where})", *(f"attention: not {n}: {reason}" for n, reason in others.items())]


def _describe(shape: AttentionShape) -> str:
    return f"{shape.heads} heads of {shape.head_size}, {shape.queries} queries x {shape.keys} keys"


@contextmanager
def prefer_kernel(name: str, device: torch.device) -> Iterator[None]:
    """Makes all attentions of the process use this kernel while the context is open, or one after it in the order where
    it does not support them. Those before it are disabled: PyTorch ignores the order on a CPU."""
    order = kernel_order(device)
    allowed = [KERNELS[n] for n in (order[order.index(name) :] if name in KERNELS else order)]
    with sdpa_kernel(allowed, set_priority=True):
        if allowed[0] is not SDPBackend.CUDNN_ATTENTION:
            yield
            return
        before = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = falls_through(before, allowed[1:])
        try:
            yield
        finally:
            F.scaled_dot_product_attention = before


def falls_through(attend: Callable[..., Tensor], others: list[SDPBackend]) -> Callable[..., Tensor]:
    """`attend`, or the other kernels where cuDNN fails. PyTorch asks cuDNN for a plan only after it has chosen cuDNN, and
    raises if there is none for a shape; it does not go on to the next kernel. So every new shape is tried, forward and, if it
    needs gradients, backward."""
    works: dict[tuple, bool] = {}

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
        if torch.compiler.is_compiling():
            return attend(query, key, value, *args, **kwargs)
        tensors = (query, key, value)
        what = (query.dtype, torch.is_grad_enabled(), *((x.shape, x.stride(), x.requires_grad) for x in tensors))
        if what not in works:
            works[what] = True
            try:
                _trial(lambda *copies: attend(*copies, *args, **kwargs), tensors)
            except RuntimeError as error:
                if "cudnn" not in str(error).lower():
                    raise
                works[what] = False
                log.warning(
                    f"attention: cuDNN fails for {tuple(query.shape)} x {tuple(key.shape)} ({_reason(error, [])}): the next "
                    "kernel that supports this shape computes it"
                )
        with nullcontext() if works[what] else sdpa_kernel(others, set_priority=True):
            return attend(query, key, value, *args, **kwargs)

    return attention


def _trial(attend: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> None:
    """Forward and backward. Recomputed activations must not see the trial's: it has hooks of its own."""
    copies = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        result = attend(*copies)
        if result.requires_grad:
            torch.autograd.grad(result, [x for x in copies if x.requires_grad], torch.ones_like(result))


class AttentionProcessor:
    """diffusers' AttnProcessor2_0 for the plain attentions of a UNet, bit for bit, without its division by one. With
    xformers, tensors keep the layout of the projections, which saves diffusers' three copies."""

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
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states).view(batch, queries, attn.heads, -1)
        key, value = (f(context).view(batch, context.shape[1], attn.heads, -1) for f in (attn.to_k, attn.to_v))
        out = self.attend(query, key, value).reshape(batch, queries, -1)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def install_processors(network: nn.Module, name: str) -> int:
    """Sets our processor on a UNet's plain attentions and returns their number. Other attentions (over pixels with
    their own normalisation, or over two streams as in SD3) keep diffusers' processor and follow `prefer_kernel` alone.

    Raises ModelError for xformers on a network without plain attentions.
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
