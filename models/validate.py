"""Validation of a pipeline folder from its small files, before any weight is read."""

from collections.abc import Sequence
from pathlib import Path

import transformers

from models.diffusion import Schedule
from models.errors import ModelError
from models.families import Family, family_of, network_family
from models.files import STEM, read_json, refuse_pointer, variant_name, variant_of, weight_files
from models.lora_files import describe_file, is_adapter
from models.pipeline import load_schedule, text_encoders

# What makes a pipeline of a LoRA file, and of a whole model in one file.
FUSE = (
    "python -c \"from diffusers import DiffusionPipeline as P; p = P.from_pretrained('PIPELINE'); p.load_lora_weights('LORA'); "
    "p.fuse_lora(); p.unload_lora_weights(); p.save_pretrained('FUSED')\""
)
UNPACK = "python -c \"from diffusers import StableDiffusionXLPipeline as P; P.from_single_file('FILE').save_pretrained('FOLDER')\""


def check_pipeline(folder: Path, variant: str = "") -> Path:
    """Returns the folder if all parts that its family needs exist and are supported. Raises ModelError for the first
    problem: a missing file, pickle weights, an unknown pipeline, denoiser, scheduler or prediction type."""
    folder = Path(folder)
    family = check_configs(folder)
    encoders = text_encoders(read_json(folder / "model_index.json"))
    for part in (family.part, "vae"):
        weight_files(folder / part, variant)
    for part in encoders:
        weight_files(folder / part, variant, "model")
        tokenizer = part.replace("text_encoder", "tokenizer")
        _require(folder, tokenizer)
        for file in sorted((folder / tokenizer).glob("*")):
            refuse_pointer(file)
    return folder


def check_configs(folder: Path) -> Family:
    """The family of a pipeline folder whose configurations are complete and supported; needs no weights. Raises ModelError."""
    _refuse_other_files(folder, "pipeline")
    _require(folder, "model_index.json")
    family = family_of(folder)
    index = read_json(folder / "model_index.json")
    _check_index(index, family, folder)
    encoders = text_encoders(index)
    for part in (family.part, "vae", *family.encoders, *encoders):
        _require(folder, f"{part}/config.json")
    _require(folder, "scheduler/scheduler_config.json")
    config, vae = (read_json(folder / part / "config.json") for part in (family.part, "vae"))
    if not family.fits(config):
        kind, added = config.get("_class_name"), config.get("addition_embed_type")
        raise ModelError(
            f"pipeline {folder}: {family.part}/config.json is a {kind} (addition_embed_type {added}), not the denoiser "
            f"of a {family.pipeline.__name__}"
        )
    family.check(config, str(folder / family.part))
    if type(vae.get("latent_channels")) is not int or not isinstance(vae.get("block_out_channels"), list):
        raise ModelError(
            f"pipeline {folder}: vae/config.json has no latent_channels or block_out_channels: copy the file that belongs to "
            "the weights"
        )
    if not config["in_channels"] == config["out_channels"] == vae["latent_channels"]:
        raise ModelError(
            f"pipeline {folder}: the denoiser has {config['in_channels']} input and {config['out_channels']} output "
            f"channels, latents have {vae['latent_channels']}: use a text-to-image pipeline (no inpainting or editing)"
        )
    if vae.get("latents_mean") is not None:
        raise ModelError(f"pipeline {folder}: vae/config.json has latents_mean, which is not supported")
    try:
        load_schedule(folder)
    except ModelError as error:
        raise ModelError(f"pipeline {folder}: {error}") from error
    return family


def check_start(folder: Path, variant: str = "") -> Path:
    """Returns the folder that `generator_start` names, if it holds a whole supported denoiser. Raises ModelError."""
    _refuse_other_files(folder, "generator_start")
    if (folder / "model_index.json").exists():
        part = family_of(folder).part
        raise ModelError(
            f"generator_start {folder}: a whole pipeline, a denoiser's folder is expected: set {folder / part}"
        )
    if not (folder / "config.json").exists():
        raise ModelError(
            f"generator_start {folder}: config.json is missing: set it to the folder of a denoiser in diffusers' format, such as "
            "a pipeline's unet/"
        )
    network_family(read_json(folder / "config.json"), f"generator_start {folder}")
    weight_files(folder, variant)
    return folder


def _refuse_other_files(path: Path, key: str) -> None:
    """Raises ModelError, with the way out, for a LoRA or a single file where `key` wants a folder of whole networks."""
    if is_adapter(path):
        use = "pipeline=FUSED" if key == "pipeline" else "generator_start=FUSED/unet"
        raise ModelError(f"{key} {path}: {describe_file(path)}, not whole weights: merge it once and set {use}: {FUSE}")
    if path.is_file():
        raise ModelError(
            f"{key} {path}: {describe_file(path)}, a folder in diffusers' format is expected: convert a whole model once: "
            f"{UNPACK} (with the pipeline class of its family)"
        )


def _check_index(index: dict, family: Family, folder: Path) -> None:
    """Raises ModelError unless each part in a model_index.json is two names, and each required one is there."""
    required = {family.part, "vae", "scheduler", *family.encoders}
    required |= {name.replace("text_encoder", "tokenizer") for name in family.encoders}
    parts = required | {"text_encoder_3", "tokenizer_3", *family.unused} & index.keys()
    for name in sorted(parts | {name for name, kind in index.items() if isinstance(kind, list)}):
        kind = index.get(name)
        names = isinstance(kind, list) and len(kind) == 2
        if names and (all(isinstance(k, str) for k in kind) or (kind == [None, None] and name not in required)):
            continue
        shown = "null" if kind is None else kind
        raise ModelError(
            f"pipeline {folder}: model_index.json has {name}: {shown}, two names are expected, such as "
            f'["diffusers", "AutoencoderKL"]'
            + ("" if name in required else ", or [null, null] for a part that it lacks")
        )
    for name in text_encoders(index):
        if not hasattr(transformers, index[name][1]):
            raise ModelError(
                f"pipeline {folder}: model_index.json has {name}: {index[name]}, which is no class of transformers: correct it"
            )


def check_fit(
    folder: Path,
    resolution: int,
    timesteps: tuple[int, ...] = (),
    variant: str = "",
    buckets: Sequence[tuple[int, int]] = (),
) -> None:
    """Checks that a valid pipeline folder supports this resolution, or these buckets (height, width), and these timesteps of
    a generator, and that its denoiser has weight files of the variant (other parts may be plain). Raises ModelError."""
    family = family_of(folder)
    if variant and not variant_of(weight_files(folder / family.part, variant), variant):
        wanted = variant_name(f"{STEM}.safetensors", variant)
        raise ModelError(f"variant={variant}: {folder / family.part} has no {wanted}: use another variant or none")
    config, vae = (read_json(folder / part / "config.json") for part in (family.part, "vae"))
    check_sizes(family, config, vae, load_schedule(folder), resolution, timesteps, str(folder), buckets)


def check_sizes(
    family: Family,
    config: dict,
    vae: dict,
    schedule: Schedule,
    resolution: int,
    timesteps: tuple[int, ...],
    where: str,
    buckets: Sequence[tuple[int, int]] = (),
) -> None:
    """Checks that a denoiser and an autoencoder with these configurations support this resolution, or these buckets (height,
    width), and these timesteps of a generator. where: the pipeline. Raises ModelError."""
    unit = 2 ** (len(vae["block_out_channels"]) - 1) * family.patch(config)
    largest = family.largest_side(config)
    most = largest // family.patch(config) * unit if largest else 0
    shapes = [(f"data.buckets: {list(size)}", size) for size in buckets]
    for name, size in shapes or [(f"data.resolution={resolution}", (resolution,))]:
        if any(side % unit for side in size):
            near = [max(side // unit, 1) * unit for side in size]
            raise ModelError(
                f"{name} is not a multiple of {unit} pixels (autoencoder and patches of {where}): "
                f"use {near if buckets else near[0]}"
            )
        if most and max(size) > most:
            raise ModelError(f"{name}: {where} supports at most {most} pixels")
    if timesteps:
        _check_timesteps(where, schedule, timesteps)


def _check_timesteps(where: str, schedule: Schedule, timesteps: tuple[int, ...]) -> None:
    several = len(timesteps) > 1
    given = f"backtrack.student_timesteps={list(timesteps)}" if several else f"conditioning_timestep={timesteps[0]}"
    if schedule.prediction == "flow" and several:
        raise ModelError(
            f"{given}: {where} is a flow, for which no diffusers scheduler can express such steps: "
            f"set backtrack.student_timesteps=[] and conditioning_timestep={schedule.last}"
        )
    if schedule.prediction == "flow" and timesteps[0] != schedule.last:
        raise ModelError(
            f"{given}: the single step of a flow starts from pure noise (its scheduler cannot express anything else): "
            f"set conditioning_timestep={schedule.last}"
        )
    if timesteps[0] > schedule.last:
        raise ModelError(f"{given}: the timesteps of {where} end at {schedule.last}: set a smaller one")


def _require(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        raise ModelError(
            f"pipeline {folder}: {name} is missing: set `pipeline` to the folder of a diffusers text-to-image pipeline"
        )
