"""Speed options that do not change the mathematics: compilation, memory format, TF32."""

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

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


def compile_blocks(network: nn.Module) -> int:
    """Compiles each transformer and residual block in place, at its first call; returns the number of blocks. Equal
    blocks share their code; compiling the whole network would take many times longer."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


def channels_last(network: nn.Module) -> None:
    """Converts the weights of convolutions to channels last, in place; activations follow."""
    network.to(memory_format=torch.channels_last)
