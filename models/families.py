"""Families of text-to-image models: everything that differs between SDXL, Stable Diffusion 1 and 2, and 3.

A pipeline folder's own configuration determines its family. No stage depends on a family's name: supporting a new
teacher takes one more class here, and an instance of it in FAMILIES.
"""

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
from models.files import read_json

Inputs = tuple[tuple, dict]


class Family(ABC):
    """One model family."""

    name: str  # stored in a Conditioning, so that `models.denoise.call` can build the network's arguments
    pipeline: type[DiffusionPipeline]  # encodes text, and loads exported pipelines
    network: type[ModelMixin]
    part = "unet"  # the denoiser's folder in a pipeline folder
    encoders: tuple[str, ...]  # folders of the required text encoders
    unused: tuple[str, ...] = ()  # pipeline parts not needed to encode text
    extra_tokens = 0  # text states after those of the first encoder's tokens
    sizes: tuple[str, ...]  # whole numbers that a network's configuration must have
    more_inputs: tuple[str, ...] = ()  # settings of a network that give it more inputs than ours

    def fits(self, config: dict) -> bool:
        """Whether a network's configuration (its config.json) belongs to this family."""
        return config.get("_class_name") == self.network.__name__

    def check(self, config: dict, where: str) -> None:
        """Raises ModelError for a network's configuration that lacks a size, or that asks for other inputs than `inputs` has.
        where: names it."""
        for key in self.sizes:
            if type(config.get(key)) is not int:
                raise ModelError(
                    f"{where}: {key} is {config.get(key, 'missing')} in its config.json, a whole number is expected: copy "
                    "the file that belongs to the weights"
                )
        if config.get("quantization_config") is not None:
            raise ModelError(
                f"{where}: its config.json has a quantization_config: use the model's float16, bfloat16 or float32 weights"
            )
        for key in self.more_inputs:
            if config.get(key) is not None:
                raise ModelError(
                    f"{where}: {key} is {config[key]} in its config.json, so that the network needs more than text: use a "
                    f"text-to-image model with a plain {self.network.__name__}"
                )

    @abstractmethod
    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> Inputs:
        """The network's positional and keyword arguments for x [B, C, H, W] and timesteps t [B]."""

    @abstractmethod
    def encode(
        self, parts: DiffusionPipeline, captions: list[str], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Text states [B, L, D] and, if the family has it, pooled text [B, P], exactly as in the diffusers pipeline."""

    def empty_is_zero(self, parts: DiffusionPipeline) -> bool:
        """Whether guidance uses zeros as the empty caption, instead of an encoded ""."""
        return False

    def uses_time_ids(self) -> bool:
        return False

    def tokens(self, parts: DiffusionPipeline) -> int:
        """Length L of the text states, padding included."""
        return parts.tokenizer.model_max_length + self.extra_tokens

    def example(
        self, config: dict, batch: int, latent_shape: tuple[int, int, int], tokens: int, **like: object
    ) -> Inputs:
        """`inputs` of zeros for a network of this configuration. like: device and dtype of latents and text."""
        width, pooled = self.widths(config)
        x = torch.zeros(batch, *latent_shape, **like)
        t = torch.zeros(batch, dtype=torch.long, device=like.get("device"))
        cond = Conditioning(
            torch.zeros(batch, tokens, width, **like),
            None if pooled is None else torch.zeros(batch, pooled, **like),
            torch.zeros(batch, 6, device=like.get("device")) if self.uses_time_ids() else None,
            family=self.name,
        )
        return self.inputs(x, t, cond)

    @abstractmethod
    def widths(self, config: dict) -> tuple[int, int | None]:
        """Widths D of the text states and P of the pooled text (or None) of a network with this configuration."""

    def largest_side(self, config: dict) -> int | None:
        """The largest latent side that a network of this configuration accepts; None for no limit."""
        return None

    def patch(self, config: dict) -> int:
        """The factor that must divide the latent's side."""
        return 1

    def placeholder(self, config: dict) -> ModelMixin | None:
        """The denoiser's replacement in a pipeline that only encodes text."""
        return None


UNET_INPUTS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder, no added conditions."""

    name = "sd"
    pipeline, network = StableDiffusionPipeline, UNet2DConditionModel
    encoders = ("text_encoder",)
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    sizes, more_inputs = ("in_channels", "out_channels", "cross_attention_dim"), UNET_INPUTS

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
    sizes = (*StableDiffusion.sizes, "projection_class_embeddings_input_dim", "addition_time_embed_dim")
    more_inputs = UNET_INPUTS

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
    """Stable Diffusion 3 (Esser et al. 2024): a transformer with flow prediction, two CLIP encoders, optionally T5."""

    name = "sd3"
    pipeline, network, part = StableDiffusion3Pipeline, SD3Transformer2DModel, "transformer"
    encoders = ("text_encoder", "text_encoder_2")
    unused = ("feature_extractor", "image_encoder")
    sizes = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim", "patch_size")
    sizes += ("pos_embed_max_size",)
    extra_tokens = 256  # T5's: the pipeline's max_sequence_length; zeros without T5, as in the pipeline

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> Inputs:
        text = {"encoder_hidden_states": cond.states.to(x.dtype), "pooled_projections": cond.pooled.to(x.dtype)}
        return (), {"hidden_states": x, "timestep": t, **text}

    def encode(
        self, parts: DiffusionPipeline, captions: list[str], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        states, _, pooled, _ = parts.encode_prompt(
            captions, None, None, device, do_classifier_free_guidance=False, max_sequence_length=self.extra_tokens
        )
        return states, pooled

    def widths(self, config: dict) -> tuple[int, int | None]:
        return config["joint_attention_dim"], config["pooled_projection_dim"]

    def patch(self, config: dict) -> int:
        return config["patch_size"]

    def largest_side(self, config: dict) -> int | None:
        return config["pos_embed_max_size"] * config["patch_size"]

    def placeholder(self, config: dict) -> ModelMixin | None:
        with torch.device("meta"):  # the pipeline reads the width of the text states from its transformer's config
            return SD3Transformer2DModel.from_config({**config, "num_layers": 1, "dual_attention_layers": ()})


FAMILIES: dict[str, Family] = {f.name: f for f in (StableDiffusionXL(), StableDiffusion(), StableDiffusion3())}


def family_of(pipeline: Path) -> Family:
    """The family of a pipeline folder, from its model_index.json. Raises ModelError for an unknown one."""
    file = Path(pipeline) / "model_index.json"
    found = read_json(file).get("_class_name")
    for family in FAMILIES.values():
        if family.pipeline.__name__ == found:
            return family
    known = ", ".join(f.pipeline.__name__ for f in FAMILIES.values())
    raise ModelError(f"{file}: unsupported pipeline {found}: use one of {known}")


def network_family(config: dict, where: str = "network") -> Family:
    """The family of a network, from its configuration. Raises ModelError for an unknown or an unusable one."""
    for family in FAMILIES.values():
        if family.fits(config):
            family.check(config, where)
            return family
    kind, added = config.get("_class_name"), config.get("addition_embed_type")
    raise ModelError(
        f"{where}: unsupported denoiser {kind} (addition_embed_type {added}): use SDXL or Stable Diffusion 1 to 3"
    )
