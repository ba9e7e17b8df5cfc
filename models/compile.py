"""Switches of speed that change no mathematics: memory format, compilation, TF32."""

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

BLOCKS = (BasicTransformerBlock, JointTransformerBlock, ResnetBlock2D)
# Compiled variants of one block's code: sizes, with and without gradients, batch and doubled batch. SDXL needs about 40;
# at torch's own limit of 8 the rest would run uncompiled without a word.
VARIANTS = 128


def set_tf32(on: bool) -> None:
    """Whether float32 matrix products and convolutions on NVIDIA GPUs round their inputs to TF32 (10 bits of mantissa).

    The older of PyTorch's two interfaces: it sets both, and reading the older one after setting only the newer raises.
    """
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def compile_blocks(network: nn.Module) -> int:
    """Compiles each repeated block in place (transformer and residual blocks: equal ones share their code), not the
    whole network, which takes many times longer; returns how many blocks there are. They compile when first called."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


def channels_last(network: nn.Module) -> None:
    """Lays the weights of convolutions out with channels last, in place; activations follow them."""
    network.to(memory_format=torch.channels_last)
