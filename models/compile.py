"""Speed and memory options that do not change the mathematics: compilation, checkpointing, memory format, TF32, and which
algorithms a GPU may choose."""

import os

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

BLOCKS = (BasicTransformerBlock, JointTransformerBlock, ResnetBlock2D)
# Compiled variants of one block's code: sizes, with and without gradients, batch and doubled batch. SDXL needs about
# 40; beyond torch's default limit of 8, blocks would silently run uncompiled.
VARIANTS = 128


def set_tf32(on: bool) -> None:
    """Switches TF32 (10 bits of mantissa) for float32 matrix products and convolutions on NVIDIA GPUs.

    Uses the older of PyTorch's two interfaces: it sets both, and reading it raises after setting only the newer one.
    """
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def set_deterministic(on: bool) -> None:
    """On: a GPU computes the same bits each time, with algorithms that PyTorch knows to be deterministic; an operation that
    has none raises. Off: cuDNN times its algorithms at the first call with each shape and keeps the fastest, which may be
    another one in the next process.

    Call it before the first matrix product on a GPU: cuBLAS and PyTorch read the variable once.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # DeepSpeed's buffers are written before they are read
    torch.backends.cudnn.benchmark = not on


def checkpoint_blocks(network: nn.Module) -> None:
    """Activation checkpointing of a diffusers network: blocks are computed again in the backward pass. Random generators are
    only saved and restored for it if the network, with its adapter, has dropout: nothing else draws from them."""
    drops = any(isinstance(module, _DropoutNd) and module.p > 0 for module in network.modules())

    def call(block: nn.Module, *args: object) -> object:
        return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=drops)

    network.enable_gradient_checkpointing(call)


def compile_blocks(network: nn.Module, shapes: int = 1) -> int:
    """Compiles each transformer and residual block in place, at its first call with each of `shapes` image shapes; returns
    the number of blocks. Equal blocks share their code; compiling the whole network would take many times longer."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS * shapes)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, VARIANTS * shapes)
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


def channels_last(network: nn.Module) -> None:
    """Converts the weights of convolutions to channels last, in place; activations follow."""
    network.to(memory_format=torch.channels_last)
