"""Families of text-to-image models: all that differs between SDXL, Stable Diffusion 1 and 2, and Stable Diffusion 3.

Which family a pipeline folder is of, its own configuration says. No stage asks for a family's name: a new teacher
is one more class here, and an instance of it in FAMILIES.
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from models.conditioning import Conditioning
from models.errors import ModelError

Inputs = tuple[tuple, dict]


def read_json(file: Path) -> dict:
    """A configuration file as a dictionary. Raises ModelError if it is not there or not JSON."""
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}: not JSON: {error}") from error


class Family(ABC):
    """One family. A class, not a table of functions: families share most of what their relatives do."""

    name: str  # also what a Conditioning carries, so that a network is called the right way
    pipeline: type[DiffusionPipeline]  # encodes text, and is what an export loads as
    network: type[ModelMixin]
    part = "unet"  # the denoiser's folder in a pipeline folder
    encoders: tuple[str, ...]  # folders of the text encoders that a pipeline must have
    unused: tuple[str, ...] = ()  # parts that are of no use to encode text
    more_tokens = 0  # text states behind those of the first encoder's tokens

    def fits(self, config: dict) -> bool:
        """Whether a network's configuration (its config.json) is of this family."""
        return config.get("_class_name") == self.network.__name__

    @abstractmethod
    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> Inputs:
        """Positional and named arguments of the network at x [B, C, H, W] and timesteps t [B]."""

    @abstractmethod
    def encode(
        self, parts: DiffusionPipeline, captions: list[str], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Text states [B, L, D] and pooled text [B, P], if the family has it, as the diffusers pipeline makes them."""

    def empty_is_zero(self, parts: DiffusionPipeline) -> bool:
        """Whether guidance's empty caption is all zeros instead of an encoded ""."""
        return False

    def uses_time_ids(self) -> bool:
        return False

    def tokens(self, parts: DiffusionPipeline) -> int:
        """Length L of the text states, padding included."""
        return parts.tokenizer.model_max_length + self.more_tokens

    def example(
        self, config: dict, batch: int, latent_shape: tuple[int, int, int], tokens: int, **like: object
    ) -> Inputs:
        """`inputs` for a network of this configuration, all zeros. like: device and dtype of latents and text."""
        width, pooled = self.widths(config)
        x, t = (
            torch.zeros(batch, *latent_shape, **like),
            torch.zeros(batch, dtype=torch.long, device=like.get("device")),
        )
        cond = Conditioning(
            torch.zeros(batch, tokens, width, **like),
            None if pooled is None else torch.zeros(batch, pooled, **like),
            torch.zeros(batch, 6, device=like.get("device")) if self.uses_time_ids() else None,
            family=self.name,
        )
        return self.inputs(x, t, cond)

    @abstractmethod
    def widths(self, config: dict) -> tuple[int, int | None]:
        """Widths D of the text states and P of the pooled text that a network of this configuration takes."""

    def largest_side(self, config: dict) -> int | None:
        """The largest latent side that a network of this configuration takes, None if there is none."""
        return None

    def patch(self, config: dict) -> int:
        """The latent's side must be a multiple of this."""
        return 1

    def stand_in(self, config: dict) -> ModelMixin | None:
        """What the text pipeline is given instead of its denoiser."""
        return None


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder, no added conditions."""

    name = "sd"
    pipeline, network = StableDiffusionPipeline, UNet2DConditionModel
    encoders = ("text_encoder",)
    unused = ("safety_checker", "feature_extractor", "image_encoder")

    def fits(self, config: dict) -> bool:
        return super().fits(config) and config.get("addition_embed_type") is None

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> Inputs:
        return (x, t), {"encoder_hidden_states": cond.states.to(x.dtype)}

    def encode(
        self, parts: DiffusionPipeline, captions: list[str], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        return parts.encode_prompt(captions, device, 1, do_classifier_free_guidance=False)[0], None

    def widths(self, config: dict) -> tuple[int, int | None]:
        return config["cross_attention_dim"], None


class StableDiffusionXL(Family):
    """SDXL (Podell et al. 2023): two text encoders, pooled text, and time ids (section 2.2)."""

    name = "sdxl"
    pipeline, network = StableDiffusionXLPipeline, UNet2DConditionModel
    encoders = ("text_encoder", "text_encoder_2")
    unused = ("feature_extractor", "image_encoder")

    def fits(self, config: dict) -> bool:
        return super().fits(config) and config.get("addition_embed_type") == "text_time"

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> Inputs:
        added = {"text_embeds": cond.pooled.to(x.dtype), "time_ids": cond.time_ids}
        return (x, t), {"encoder_hidden_states": cond.states.to(x.dtype), "added_cond_kwargs": added}

    def encode(
        self, parts: DiffusionPipeline, captions: list[str], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        states, _, pooled, _ = parts.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
        return states, pooled

    def empty_is_zero(self, parts: DiffusionPipeline) -> bool:
        return bool(parts.config.get("force_zeros_for_empty_prompt", True))

    def uses_time_ids(self) -> bool:
        return True

    def widths(self, config: dict) -> tuple[int, int | None]:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return config["cross_attention_dim"], pooled


class StableDiffusion3(Family):
    """Stable Diffusion 3 (Esser et al. 2024): a transformer with flow prediction, two CLIP encoders, perhaps T5."""

    name = "sd3"
    pipeline, network, part = StableDiffusion3Pipeline, SD3Transformer2DModel, "transformer"
    encoders = ("text_encoder", "text_encoder_2")
    unused = ("feature_extractor", "image_encoder")
    more_tokens = 256  # T5's: the pipeline's max_sequence_length; without T5 they are zeros, as in the pipeline

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> Inputs:
        text = {"encoder_hidden_states": cond.states.to(x.dtype), "pooled_projections": cond.pooled.to(x.dtype)}
        return (), {"hidden_states": x, "timestep": t, **text}

    def encode(
        self, parts: DiffusionPipeline, captions: list[str], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        states, _, pooled, _ = parts.encode_prompt(
            captions, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=self.more_tokens
        )
        return states, pooled

    def widths(self, config: dict) -> tuple[int, int | None]:
        return config["joint_attention_dim"], config["pooled_projection_dim"]

    def patch(self, config: dict) -> int:
        return config["patch_size"]

    def largest_side(self, config: dict) -> int | None:
        return config["pos_embed_max_size"] * config["patch_size"]

    def stand_in(self, config: dict) -> ModelMixin | None:
        with torch.device("meta"):  # the pipeline reads the text's width off its transformer's configuration
            return SD3Transformer2DModel.from_config({**config, "num_layers": 1, "dual_attention_layers": ()})


FAMILIES: dict[str, Family] = {f.name: f for f in (StableDiffusionXL(), StableDiffusion(), StableDiffusion3())}


def family_of(pipeline: Path) -> Family:
    """The family of a pipeline folder, from its model_index.json. Raises ModelError for one that is not known."""
    file = Path(pipeline) / "model_index.json"
    found = read_json(file).get("_class_name")
    for family in FAMILIES.values():
        if family.pipeline.__name__ == found:
            return family
    known = ", ".join(f.pipeline.__name__ for f in FAMILIES.values())
    raise ModelError(f"{file}: {found} is not a pipeline that can be distilled here: use one of {known}")


def network_family(config: dict, where: str = "network") -> Family:
    """The family of a network, from its own configuration. Raises ModelError for one that is not known."""
    for family in FAMILIES.values():
        if family.fits(config):
            return family
    kind, added = config.get("_class_name"), config.get("addition_embed_type")
    raise ModelError(f"{where}: {kind} (addition_embed_type {added}) is not a denoiser that can be distilled here")
