"""What a pipeline is made of, without weights: from a local folder's configurations, or from the package for known hub ids."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.errors import ModelError

FACTS = Path(__file__).resolve().parent / "architectures"
HUB = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
}


@dataclass(frozen=True)
class Architecture:
    """The configurations of a pipeline's parts, as their JSON files have them."""

    name: str
    unet: dict
    vae: dict
    text_encoders: tuple[dict, ...]
    scheduler: dict

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of an image with `resolution` pixels a side."""
        side = resolution // 2 ** (len(self.vae["block_out_channels"]) - 1)
        return self.vae["latent_channels"], side, side

    @property
    def tokens(self) -> int:
        return self.text_encoders[0]["max_position_embeddings"]

    @cached_property
    def text_parameters(self) -> int:
        """Parameters of all text encoders, counted on the meta device."""
        count = 0
        with torch.device("meta"):
            for config in self.text_encoders:
                projected = config["architectures"][0] == "CLIPTextModelWithProjection"
                kind = CLIPTextModelWithProjection if projected else CLIPTextModel
                count += sum(p.numel() for p in kind(CLIPTextConfig.from_dict(config)).parameters())
        return count

    @cached_property
    def vae_parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoencoderKL.from_config(self.vae).parameters())


def find_architecture(pipeline: str) -> Architecture:
    """The architecture of a pipeline folder or of a known hub id. Raises ModelError naming the known ids."""
    folder = Path(pipeline)
    if (folder / "model_index.json").is_file():
        parts = [folder / "unet" / "config.json", folder / "vae" / "config.json"]
        encoders = [folder / name / "config.json" for name in ("text_encoder", "text_encoder_2")]
        schedule = folder / "scheduler" / "scheduler_config.json"
    elif pipeline in HUB:
        folder = FACTS / HUB[pipeline]
        parts = [folder / "unet.json", folder / "vae.json"]
        encoders = [folder / name for name in ("text_encoder.json", "text_encoder_2.json")]
        schedule = folder / "scheduler.json"
    else:
        raise ModelError(
            f"pipeline: '{pipeline}' is neither a pipeline folder nor a known hub id: give a folder with a "
            f"model_index.json, or one of {', '.join(HUB)}"
        )
    unet, vae = (_read(file) for file in parts)
    texts = tuple(_read(file) for file in encoders if file.is_file())
    return Architecture(pipeline, unet, vae, texts, _read(schedule))


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"{file}: cannot be read as a part's configuration: {error}") from error
