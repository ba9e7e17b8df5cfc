"""What can be said of a pipeline folder from its small files, before any weight is read."""

from pathlib import Path

from models.diffusion import Schedule
from models.errors import ModelError
from models.families import family_of, read_json
from models.pipeline import load_schedule, text_encoders, variant_name, weight_files


def check_pipeline(folder: Path, variant: str = "") -> Path:
    """Returns the folder if every part that its family needs is there and known. ModelError names the first mistake:
    a missing file, pickle weights, an unknown pipeline, denoiser, scheduler or prediction type."""
    folder = Path(folder)
    _there(folder, "model_index.json")
    family = family_of(folder)
    for part in (family.part, "vae", *family.encoders):
        _there(folder, f"{part}/config.json")
    _there(folder, "scheduler/scheduler_config.json")
    for part in (family.part, "vae"):
        weight_files(folder / part, variant)
    for part in text_encoders(read_json(folder / "model_index.json")):
        weight_files(folder / part, variant, "model")
        _there(folder, part.replace("text_encoder", "tokenizer"))
    config, vae = (read_json(folder / part / "config.json") for part in (family.part, "vae"))
    if not family.fits(config):
        kind, added = config.get("_class_name"), config.get("addition_embed_type")
        raise ModelError(
            f"pipeline {folder}: {family.part}/config.json is a {kind} (addition_embed_type {added}), not the denoiser of a "
            f"{family.pipeline.__name__}"
        )
    if not config["in_channels"] == config.get("out_channels") == vae["latent_channels"]:
        raise ModelError(
            f"pipeline {folder}: the denoiser takes {config['in_channels']} and gives {config.get('out_channels')} channels, "
            f"latents have {vae['latent_channels']}: use a text-to-image pipeline (no inpainting, no image editing)"
        )
    if vae.get("latents_mean") is not None:
        raise ModelError(f"pipeline {folder}: vae/config.json has latents_mean, which is not supported")
    try:
        load_schedule(folder)
    except ModelError as error:
        raise ModelError(f"pipeline {folder}: {error}") from error
    return folder


def check_fit(folder: Path, resolution: int, timesteps: tuple[int, ...] = (), variant: str = "") -> None:
    """Whether a checked pipeline folder takes images of this resolution and, if given, these timesteps of a student (one:
    the conditioning timestep), and has weight files of the variant for its denoiser (other parts may be plain). Raises
    ModelError."""
    family = family_of(folder)
    if variant and f".{variant}" not in weight_files(folder / family.part, variant)[0].name:
        wanted = variant_name("diffusion_pytorch_model.safetensors", variant)
        raise ModelError(f"variant={variant}: {folder / family.part} has no {wanted}: use another variant, or none")
    config, vae = (read_json(folder / part / "config.json") for part in (family.part, "vae"))
    unit = 2 ** (len(vae["block_out_channels"]) - 1) * family.patch(config)
    if resolution % unit:
        near = max(resolution // unit, 1) * unit
        raise ModelError(
            f"data.resolution={resolution} is not a multiple of {unit} pixels (autoencoder and patches of {folder}): use {near}"
        )
    largest = family.largest_side(config)
    if largest and resolution // unit * family.patch(config) > largest:
        most = largest // family.patch(config) * unit
        raise ModelError(f"data.resolution={resolution}: {folder} takes at most {most} pixels")
    if timesteps:
        _check_timesteps(folder, load_schedule(folder), timesteps)


def _check_timesteps(folder: Path, schedule: Schedule, timesteps: tuple[int, ...]) -> None:
    several = len(timesteps) > 1
    given = f"backtrack.student_timesteps={list(timesteps)}" if several else f"conditioning_timestep={timesteps[0]}"
    if schedule.prediction == "flow" and several:
        raise ModelError(
            f"{given}: {folder} is a flow, of which no scheduler of a plain pipeline holds such steps: "
            f"set backtrack.student_timesteps=[] and conditioning_timestep={schedule.last}"
        )
    if schedule.prediction == "flow" and timesteps[0] != schedule.last:
        raise ModelError(
            f"{given}: a flow's one step starts from pure noise (its scheduler can say nothing else): "
            f"set conditioning_timestep={schedule.last}"
        )
    if timesteps[0] > schedule.last:
        raise ModelError(f"{given}: {folder} has timesteps up to {schedule.last}")


def _there(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        raise ModelError(
            f"pipeline {folder}: {name} is missing; `pipeline` must be a diffusers text-to-image pipeline folder"
        )
