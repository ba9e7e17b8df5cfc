"""The DINOv2 network of FD-DINOv2 (Stein et al. 2023)."""

import math
from pathlib import Path

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from models.errors import ModelError
from models.scorers.preprocess import IMAGENET, normalise, over_threads, pil_resize
from models.scorers.weights import frozen, load_strictly, read_weights

SIDE, PATCH = 224, 14


def resized_positions(positions: Tensor) -> Tensor:
    """The position embeddings [1, 1 + M M, D] of the training images for images of SIDE pixels, [1, 1 + 16 16, D].

    DINOv2 resizes them bicubically without antialiasing, by a scale factor of (16 + 0.1) / M instead of 16 / M. The 0.1
    guarded against rounding to 15 and has stayed, because it shifts where the embeddings are sampled. timm has
    neither.
    """
    trained, wanted = math.isqrt(positions.shape[1] - 1), SIDE // PATCH
    if trained == wanted:
        return positions
    grid = positions[:, 1:].float().unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    scale = (wanted + 0.1) / trained
    grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)


class DinoV2:
    """Features [B, width] of FD-DINOv2: the class token of DINOv2's ViT-L/14 (without registers) after the last norm.

    Images are squashed to 224 x 224 by Pillow, bicubic in 8 bits, as dgm-eval does.
    weights: `dinov2_vitl14_pretrain.pth` of facebookresearch/dinov2, or a .safetensors file of the same weights.
    width, depth: the size of the network; the published score is of ViT-L.

    Raises ModelError for a missing or damaged file, or one of another network.
    """

    def __init__(self, weights: Path, device: torch.device, width: int = 1024, depth: int = 24):
        self.device, weights = device, Path(weights)
        state = read_weights(weights)
        what = f"the weights of DINOv2's ViT with {depth} blocks of width {width}, without registers"
        try:
            state["pos_embed"] = resized_positions(state["pos_embed"])
            state.pop("mask_token", None)  # of the training
        except (KeyError, AttributeError, RuntimeError, IndexError) as error:
            raise ModelError(f"{weights}: is not a file of {what}: it has no position embeddings") from error
        with torch.device("meta"):
            network = VisionTransformer(
                img_size=SIDE,
                patch_size=PATCH,
                embed_dim=width,
                depth=depth,
                num_heads=width // 64,  # in all sizes of DINOv2
                init_values=1.0,  # the layers have scales, which the file holds
                num_classes=0,
                global_pool="token",
            )
        load_strictly(network, state, weights, what, assign=True)
        self.network = frozen(network, device)

    @torch.inference_mode()
    def __call__(self, images: list[Tensor]) -> Tensor:
        squashed = over_threads(lambda image: pil_resize(image, SIDE, Image.Resampling.BICUBIC), images)
        pixels = torch.stack([image.to(self.device) for image in squashed])
        return self.network(normalise(pixels.float() / 255, IMAGENET))
