"""Parts of a diffusers pipeline folder: strict loading, hashing, and writing one-step pipelines."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn

from models.diffusion import Schedule
from models.errors import ModelError

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
LORA_FOLDER = "lora"  # in an exported pipeline: a LoRA folder that is not merged
NOTE = "disback.json"  # what an exported pipeline says of itself


def check_pipeline(folder: Path) -> Path:
    """Returns the folder if it has every part of an SDXL pipeline; ModelError names the first missing file."""
    needed = ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    needed += [f"{part}/config.json" for part in ("text_encoder", "text_encoder_2")]
    for name in needed:
        if not (folder / name).is_file():
            raise ModelError(
                f"pipeline {folder}: {name} is missing; `pipeline` must be a diffusers SDXL pipeline folder"
            )
    return folder


def _load_strict(kind: type, folder: Path, dtype: torch.dtype) -> nn.Module:
    """from_pretrained, but a missing or unexpected key is an error: diffusers would go on with random weights."""
    try:
        model, info = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # diffusers raises OSError, ValueError, KeyError or safetensors errors for a bad folder
        raise ModelError(f"{folder}: cannot be loaded as {kind.__name__}: {error}") from error
    wrong = {name: keys for name, keys in info.items() if keys}
    if wrong:
        raise ModelError(f"{folder}: does not fit {kind.__name__} exactly: {wrong}")
    return model


def load_unet(folder: Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The UNet of a weights folder, every key matched. Raises ModelError."""
    return _load_strict(UNet2DConditionModel, Path(folder), dtype)


def load_vae(pipeline: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The autoencoder of a pipeline folder, frozen, in evaluation mode. Raises ModelError."""
    return _load_strict(AutoencoderKL, Path(pipeline) / "vae", dtype).eval().requires_grad_(False)


def load_text(pipeline: Path, dtype: torch.dtype, device: torch.device) -> StableDiffusionXLPipeline:
    """The pipeline without UNet and VAE: tokenizers and text encoders, frozen, on the device. Raises ModelError."""
    try:
        parts = StableDiffusionXLPipeline.from_pretrained(
            pipeline, unet=None, vae=None, dtype=dtype, use_safetensors=True
        )
    except Exception as error:  # as above: the library's own errors name neither the part nor the way out
        raise ModelError(f"pipeline {pipeline}: its text encoders cannot be loaded: {error}") from error
    for encoder in (parts.text_encoder, parts.text_encoder_2):
        encoder.eval().requires_grad_(False).to(device)
    return parts


def load_schedule(pipeline: Path) -> Schedule:
    """The diffusion schedule and prediction type of a pipeline folder. Raises ModelError."""
    file = Path(pipeline) / "scheduler" / "scheduler_config.json"
    return Schedule.from_config(json.loads(file.read_text()))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a weights or LoRA folder: one, or those that its index names. Raises ModelError."""
    folder = Path(folder)
    for name in (WEIGHTS_FILE, LORA_FILE):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ModelError(f"{folder}: no {WEIGHTS_FILE} (and no index) there")
    files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{folder}: {file.name} is missing, though {index.name} names it")
    return files


def weights_hash(folder: Path) -> str:
    """sha256 over a weights folder's safetensors files, in name order, as hexadecimal. Raises ModelError."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as handle:
            while block := handle.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def replace_folder(temporary: Path, final: Path) -> None:
    """Moves a finished folder to its name; a reader sees the old folder, none, or the new one, never half of one."""
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(temporary, final)
        shutil.rmtree(old)
    else:
        os.replace(temporary, final)


def one_step_scheduler(source: Path, timestep: int) -> DDIMScheduler:
    """A scheduler whose single step starts at the conditioning timestep and ends at x0.

    It is the teacher's schedule cut off behind t_g: with trailing spacing one step starts at its last timestep, which
    is t_g, and with `set_alpha_to_one` that step returns x0 itself. So a plain pipeline call needs no `timesteps=`.
    """
    config = json.loads((Path(source) / "scheduler" / "scheduler_config.json").read_text())
    full = DDIMScheduler.from_config(config)
    return DDIMScheduler(
        num_train_timesteps=timestep + 1,
        trained_betas=full.betas[: timestep + 1].tolist(),
        prediction_type=config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        steps_offset=0,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def write_one_step_pipeline(
    source: Path, unet: Path | Callable[[Path], None], timestep: int, out: Path, note: dict, lora: Path | None = None
) -> None:
    """Writes a pipeline folder with the UNet of the folder `unet` (or what `unet` writes into the folder it is given),
    all else from `source`, for one step at `timestep`.

    `note` is kept as disback.json; a LoRA folder is copied as `lora/`. Atomic: an existing pipeline at `out` is
    replaced as a whole.
    """
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    skip = shutil.ignore_patterns("unet", "scheduler", "*.bin", "*.ckpt", "*.onnx*", "*.msgpack", "*.fp16.safetensors")
    shutil.copytree(source, temporary, ignore=skip)
    if callable(unet):
        unet(temporary / "unet")
    else:
        shutil.copytree(unet, temporary / "unet", ignore=skip)
    if lora:
        shutil.copytree(lora, temporary / LORA_FOLDER)
    one_step_scheduler(source, timestep).save_pretrained(temporary / "scheduler")
    index = json.loads((temporary / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (temporary / NOTE).write_text(json.dumps({"conditioning_timestep": timestep, **note}, indent=2) + "\n")
    replace_folder(temporary, out)
