"""The configurations of a pipeline without its weights: from a local folder, or from the package for known hub ids."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    T5Config,
    T5EncoderModel,
)

from models.errors import ModelError
from models.families import Family, family_of, network_family
from models.files import read_json

TEXT_ENCODERS: dict[str, tuple[type, type[PreTrainedConfig]]] = {
    "CLIPTextModel": (CLIPTextModel, CLIPTextConfig),
    "CLIPTextModelWithProjection": (CLIPTextModelWithProjection, CLIPTextConfig),
    "T5EncoderModel": (T5EncoderModel, T5Config),
}
FACTS = Path(__file__).resolve().parent / "architectures"
HUB = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
}


@dataclass(frozen=True)
class Architecture:
    """The configurations of a pipeline's parts, as in their JSON files."""

    name: str
    family: Family
    denoiser: dict
    vae: dict
    text_encoders: tuple[dict, ...]
    scheduler: dict

    def latent_shape(self, size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of a size (height, width) in pixels, or of a square one with this side."""
        height, width = (size, size) if isinstance(size, int) else size
        factor = 2 ** (len(self.vae["block_out_channels"]) - 1)
        return self.vae["latent_channels"], height // factor, width // factor

    @property
    def tokens(self) -> int:
        return self.text_encoders[0]["max_position_embeddings"] + self.family.extra_tokens

    @cached_property
    def text_parameters(self) -> int:
        """Parameters of all text encoders, counted on the meta device."""
        count = 0
        with torch.device("meta"):
            for config in self.text_encoders:
                kind, settings = TEXT_ENCODERS[config["architectures"][0]]
                count += sum(p.numel() for p in kind(settings.from_dict(config)).parameters())
        return count

    @cached_property
    def vae_parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoencoderKL.from_config(self.vae).parameters())


def find_architecture(pipeline: str) -> Architecture:
    """The architecture of a pipeline folder, or of a known hub id at any @REVISION; fetches nothing. Raises ModelError that
    names the known ids."""
    folder, known = Path(pipeline), HUB.get(pipeline.partition("@")[0])
    if (folder / "model_index.json").is_file():
        family = family_of(folder)
        denoiser, vae = (read_json(folder / part / "config.json") for part in (family.part, "vae"))
        encoders = [folder / f"text_encoder{number}" / "config.json" for number in ("", "_2", "_3")]
        schedule = folder / "scheduler" / "scheduler_config.json"
        network_family(denoiser, f"{folder / family.part}")
    elif known:
        folder = FACTS / known
        denoiser, vae = (read_json(folder / name) for name in ("unet.json", "vae.json"))
        family = network_family(denoiser)
        encoders = [folder / f"text_encoder{number}.json" for number in ("", "_2")]
        schedule = folder / "scheduler.json"
    else:
        raise ModelError(
            f"pipeline: '{pipeline}' is neither a pipeline folder nor a known hub id: give a folder with a "
            f"model_index.json, or one of {', '.join(HUB)}"
        )
    texts = tuple(read_json(file) for file in encoders if file.is_file())
    return Architecture(pipeline, family, denoiser, vae, texts, read_json(schedule))
