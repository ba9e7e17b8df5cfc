"""The CLIP embeddings of CMMD (Jayasumana et al. 2024)."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from models.scorers.preprocess import CLIP, normalise, over_threads, pil_resize
from models.scorers.weights import load_pretrained


def floor_square(image: Tensor) -> Tensor:
    """The central square of an image [3, H, W]; half a pixel is rounded down, unlike in torchvision."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


class Cmmd:
    """Normalised image embeddings [B, D] of CMMD.

    Images are cropped to their central square and resized by Pillow, bicubic in 8 bits, to the side of the network, as
    cmmd-pytorch does. folder: of openai/clip-vit-large-patch14-336, in the format of transformers.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.device = device
        self.network = load_pretrained(CLIPVisionModelWithProjection, Path(folder), device)
        self.side = self.network.config.image_size

    def prepared(self, image: Tensor) -> Tensor:
        return pil_resize(floor_square(image), self.side, Image.Resampling.BICUBIC)

    @torch.inference_mode()
    def __call__(self, images: list[Tensor]) -> Tensor:
        pixels = torch.stack([image.to(self.device) for image in over_threads(self.prepared, images)])
        embeddings = self.network(pixel_values=normalise(pixels.float() / 255, CLIP)).image_embeds
        return functional.normalize(embeddings, dim=1)
