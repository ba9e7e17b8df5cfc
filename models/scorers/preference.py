"""Scores trained on people's choices between images: PickScore and HPS v2.1."""

from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from models.errors import ModelError
from models.scorers.clip import cosines, model_config
from models.scorers.preprocess import CLIP, by_size, normalise, over_threads, to_pil
from models.scorers.weights import frozen, load_pretrained, load_strictly, read_weights, reason


class PickScore:
    """PickScore (Kirstain et al. 2023), [B]: the cosine times the model's logit scale, about 20 to 23.

    folder: of yuvalkirstain/PickScore_v1, in the format of transformers, with its tokenizer. Without an image processor
    there CLIP's is used, which is the published one: short side to 224 and central crop, by Pillow.

    Raises ModelError for a folder that lacks the model or the tokenizer.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.device, folder = device, Path(folder)
        self.network = load_pretrained(CLIPModel, folder, device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            has_processor = any((folder / f"{kind}_config.json").is_file() for kind in ("preprocessor", "processor"))
            # Pillow's, as when the score was published: transformers now prefers torchvision's resize.
            self.processor = CLIPImageProcessorPil.from_pretrained(folder) if has_processor else CLIPImageProcessorPil()
        except Exception as error:  # of several libraries
            raise ModelError(
                f"{folder}: its tokenizer or image processor {reason(error)}: use the whole folder of the hub"
            ) from error
        known, wanted = len(self.tokenizer), self.network.config.text_config.vocab_size
        if known < wanted:  # without its files transformers makes one that knows two tokens
            raise ModelError(f"{folder}: its tokenizer has {known} of {wanted} tokens: use the whole folder of the hub")

    @torch.inference_mode()
    def __call__(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        pixels = over_threads(lambda image: self.processor(to_pil(image), return_tensors="pt").pixel_values, images)
        text = self.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        image_features = self.network.get_image_features(pixel_values=torch.cat(pixels).to(self.device))
        text_features = self.network.get_text_features(**text.to(self.device))
        # The projected features; those of the towers are in other fields.
        scores = cosines(image_features.pooler_output, text_features.pooler_output)
        return self.network.logit_scale.exp() * scores


class HpsV2:
    """Human preference score v2.1 (Wu et al. 2023), [B]: a cosine, about 0.25 to 0.33. Tables often show it times 100.

    An image keeps its aspect ratio: its longest side is resized to the network's, bicubic with antialiasing in floating
    point, and black bars make it square. The published code computes it in float16 under autocast, this in float32.
    weights: `HPS_v2.1_compressed.pt` of xswu/HPSv2, a ViT-H-14 with plain GELU. The file of v2.0 has the same format
    and other scores. architecture: another network of open_clip, or "local-dir:" and a folder with its configuration.

    Raises ModelError for a missing or damaged file, or one of another network.
    """

    def __init__(self, weights: Path, device: torch.device, architecture: str = "ViT-H-14"):
        self.device, weights = device, Path(weights)
        model_config(architecture)
        state = read_weights(weights).get("state_dict")
        if not isinstance(state, dict):
            raise ModelError(f"{weights}: has no state_dict: use HPS_v2.1_compressed.pt of xswu/HPSv2")
        with torch.random.fork_rng(devices=[]):  # initial weights come from the global generator
            network = open_clip.create_model(architecture, load_weights=False)
        load_strictly(network, state, weights, f"HPS v2's weights of {architecture}")
        self.network = frozen(network, device)
        self.tokenizer = open_clip.get_tokenizer(architecture)
        size = network.visual.image_size
        self.side = size if isinstance(size, int) else size[0]

    def prepared(self, stack: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] to normalised pixels [N, 3, side, side]."""
        pixels = stack.to(self.device).float() / 255
        scale = self.side / max(pixels.shape[2:])
        height, width = (round(length * scale) for length in pixels.shape[2:])
        pixels = functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
        down, right = self.side - height, self.side - width
        pixels = functional.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
        return normalise(pixels, CLIP)

    @torch.inference_mode()
    def __call__(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        image_features = self.network.encode_image(by_size(self.prepared, images), normalize=False)
        text_features = self.network.encode_text(self.tokenizer(prompts).to(self.device), normalize=False)
        return cosines(image_features, text_features)
