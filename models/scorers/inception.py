"""The Inception network of FID, KID, and Inception precision and recall."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)

from models.errors import ModelError
from models.scorers.preprocess import bilinear_resize, clean_resize
from models.scorers.weights import frozen, load_strictly, read_weights


def network() -> nn.Sequential:
    """Inception v3 as TensorFlow's graph of 2015-12-05 computes it, up to the pooled features [B, 2048], for normalised
    images [B, 3, 299, 299]. Its weights have the names of pytorch-fid's and torch-fidelity's file.

    It differs from torchvision's in its average pools, which exclude the padding, and in its last block, which takes
    the maximum instead.
    """
    layers = {
        "Conv2d_1a_3x3": BasicConv2d(3, 32, kernel_size=3, stride=2),
        "Conv2d_2a_3x3": BasicConv2d(32, 32, kernel_size=3),
        "Conv2d_2b_3x3": BasicConv2d(32, 64, kernel_size=3, padding=1),
        "pool_1": nn.MaxPool2d(kernel_size=3, stride=2),
        "Conv2d_3b_1x1": BasicConv2d(64, 80, kernel_size=1),
        "Conv2d_4a_3x3": BasicConv2d(80, 192, kernel_size=3),
        "pool_2": nn.MaxPool2d(kernel_size=3, stride=2),
        "Mixed_5b": InceptionA(192, pool_features=32),
        "Mixed_5c": InceptionA(256, pool_features=64),
        "Mixed_5d": InceptionA(288, pool_features=64),
        "Mixed_6a": InceptionB(288),
        "Mixed_6b": InceptionC(768, channels_7x7=128),
        "Mixed_6c": InceptionC(768, channels_7x7=160),
        "Mixed_6d": InceptionC(768, channels_7x7=160),
        "Mixed_6e": InceptionC(768, channels_7x7=192),
        "Mixed_7a": InceptionD(768),
        "Mixed_7b": InceptionE_1(1280),
        "Mixed_7c": InceptionE_2(2048),
        "pool_3": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "fc": nn.Linear(2048, 1008),  # the classifier; it is in the file, and no score here uses it
    }
    whole = nn.Sequential()
    for name, layer in layers.items():
        whole.add_module(name, layer)
    return whole


class Inception:
    """Features [B, 2048] of FID.

    weights: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, which torch-fidelity publishes as
    `weights-inception-2015-12-05-6726825d.pth`, or a .safetensors file of the same weights.
    resize: "clean" as clean-fid by default, antialiased, normalised as (x - 128) / 128; "pytorch" as pytorch-fid,
    bilinear, normalised as 2 x / 255 - 1. Both squash an image to 299 x 299. Scores of the two are not comparable.

    Raises ModelError for a missing, damaged or other file.
    """

    def __init__(self, weights: Path, device: torch.device, resize: Literal["clean", "pytorch"] = "clean"):
        self.device, self.resize = device, resize
        weights = Path(weights)
        if weights.name == "inception-2015-12-05.pt":
            raise ModelError(
                f"{weights}: is TorchScript, a program: use the same weights as plain tensors, "
                "pt_inception-2015-12-05-6726825d.pth"
            )
        with torch.device("meta"):
            whole = network()
        load_strictly(whole, read_weights(weights), weights, "the weights of FID's Inception", assign=True)
        self.network = frozen(whole[:-1], device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: list[Tensor]) -> Tensor:
        images = [image.to(self.device) for image in images]
        inputs = (clean_resize(images) - 128) / 128 if self.resize == "clean" else 2 * bilinear_resize(images) - 1
        return self.network(inputs.contiguous(memory_format=torch.channels_last))
