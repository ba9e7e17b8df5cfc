"""Validation of a pipeline folder from its small files, before any weight is read."""

from pathlib import Path

from models.diffusion import Schedule
from models.errors import ModelError
from models.families import family_of, read_json
from models.pipeline import load_schedule, text_encoders, variant_name, weight_files


def check_pipeline(folder: Path, variant: str = "") -> Path:
    """Returns the folder if all parts that its family needs exist and are supported. Raises ModelError for the first
    problem: a missing file, pickle weights, an unknown pipeline, denoiser, scheduler or prediction type."""
    folder = Path(folder)
    _require(folder, "model_index.json")
    family = family_of(folder)
    for part in (family.part, "vae", *family.encoders):
        _require(folder, f"{part}/config.json")
    _require(folder, "scheduler/scheduler_config.json")
    for part in (family.part, "vae"):
        weight_files(folder / part, variant)
    for part in text_encoders(read_json(folder / "model_index.json")):
        weight_files(folder / part, variant, "model")
        _require(folder, part.replace("text_encoder", "tokenizer"))
    config, vae = (read_json(folder / part / "config.json") for part in (family.part, "vae"))
    if not family.fits(config):
        kind, added = config.get("_class_name"), config.get("addition_embed_type")
        raise ModelError(
            f"pipeline {folder}: {family.part}/config.json is a {kind} (addition_embed_type {added}), not the denoiser "
            f"of a {family.pipeline.__name__}"
        )
    if not config["in_channels"] == config.get("out_channels") == vae["latent_channels"]:
        raise ModelError(
            f"pipeline {folder}: the denoiser has {config['in_channels']} input and {config.get('out_channels')} output "
            f"channels, latents have {vae['latent_channels']}: use a text-to-image pipeline (no inpainting or editing)"
        )
    if vae.get("latents_mean") is not None:
        raise ModelError(f"pipeline {folder}: vae/config.json has latents_mean, which is not supported")
    try:
        load_schedule(folder)
    except ModelError as error:
        raise ModelError(f"pipeline {folder}: {error}") from error
    return folder


def check_fit(folder: Path, resolution: int, timesteps: tuple[int, ...] = (), variant: str = "") -> None:
    """Checks that a valid pipeline folder supports this resolution and these timesteps of a generator, and that its
    denoiser has weight files of the variant (other parts may be plain). Raises ModelError."""
    family = family_of(folder)
    if variant and f".{variant}" not in weight_files(folder / family.part, variant)[0].name:
        wanted = variant_name("diffusion_pytorch_model.safetensors", variant)
        raise ModelError(f"variant={variant}: {folder / family.part} has no {wanted}: use another variant or none")
    config, vae = (read_json(folder / part / "config.json") for part in (family.part, "vae"))
    unit = 2 ** (len(vae["block_out_channels"]) - 1) * family.patch(config)
    if resolution % unit:
        near = max(resolution // unit, 1) * unit
        raise ModelError(
            f"data.resolution={resolution} is not a multiple of {unit} pixels (autoencoder and patches of {folder}): "
            f"use {near}"
        )
    largest = family.largest_side(config)
    if largest and resolution // unit * family.patch(config) > largest:
        most = largest // family.patch(config) * unit
        raise ModelError(f"data.resolution={resolution}: {folder} supports at most {most} pixels")
    if timesteps:
        _check_timesteps(folder, load_schedule(folder), timesteps)


def _check_timesteps(folder: Path, schedule: Schedule, timesteps: tuple[int, ...]) -> None:
    several = len(timesteps) > 1
    given = f"backtrack.student_timesteps={list(timesteps)}" if several else f"conditioning_timestep={timesteps[0]}"
    if schedule.prediction == "flow" and several:
        raise ModelError(
            f"{given}: {folder} is a flow, for which no diffusers scheduler can express such steps: "
            f"set backtrack.student_timesteps=[] and conditioning_timestep={schedule.last}"
        )
    if schedule.prediction == "flow" and timesteps[0] != schedule.last:
        raise ModelError(
            f"{given}: the single step of a flow starts from pure noise (its scheduler cannot express anything else): "
            f"set conditioning_timestep={schedule.last}"
        )
    if timesteps[0] > schedule.last:
        raise ModelError(f"{given}: the timesteps of {folder} end at {schedule.last}: set a smaller one")


def _require(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        raise ModelError(
            f"pipeline {folder}: {name} is missing: set `pipeline` to the folder of a diffusers text-to-image pipeline"
        )
