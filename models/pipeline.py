"""Parts of a diffusers pipeline folder: strict loading, hashing, and writing one-step pipelines."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from torch import nn

from models.diffusion import FLOW, Schedule
from models.errors import ModelError
from models.families import family_of, network_family, read_json

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
NOTE = "disback.json"  # what an exported pipeline says of itself


def variant_name(name: str, variant: str) -> str:
    """diffusers' and transformers' file name of a variant: a.safetensors -> a.fp16.safetensors, and an index
    a.safetensors.index.json -> a.safetensors.index.fp16.json. Without a variant the name itself."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def weight_files(folder: Path, variant: str = "", stem: str = "diffusion_pytorch_model") -> list[Path]:
    """The safetensors files of a weights folder: one, or those that its index names.

    variant: files of this variant are taken if the folder has them, else the plain ones (nodes and checkpoints have no
    variants). stem: "model" for a text encoder. Raises ModelError.
    """
    folder = Path(folder)
    for name in dict.fromkeys((variant, "")):
        file = folder / variant_name(f"{stem}.safetensors", name)
        if file.is_file():
            return [file]
        index = folder / variant_name(f"{stem}.safetensors.index.json", name)
        if index.is_file():
            files = [folder / part for part in sorted(set(read_json(index)["weight_map"].values()))]
            for file in files:
                if not file.is_file():
                    raise ModelError(f"{folder}: {file.name} is missing, though {index.name} names it")
            return files
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder}: its weights are pickle files (*.bin), which run code when they are read; convert the pipeline once: "
            "python -c \"from diffusers import DiffusionPipeline as P; P.from_pretrained('PIPELINE', "
            "use_safetensors=False).save_pretrained('CONVERTED', safe_serialization=True)\""
        )
    raise ModelError(f"{folder}: no {stem}.safetensors (and no index) there")


def _variant_of(files: list[Path], variant: str) -> str | None:
    """The variant, if these files are of it."""
    return variant if variant and f".{variant}" in files[0].name else None


def _load_strict(kind: type, folder: Path, dtype: torch.dtype, variant: str, stem: str) -> nn.Module:
    """from_pretrained, but a missing or unexpected key is an error: the libraries would go on with random weights."""
    variant = _variant_of(weight_files(folder, variant, stem), variant)
    try:
        model, info = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, variant=variant, output_loading_info=True
        )
    except (
        Exception
    ) as error:  # the libraries raise OSError, ValueError, KeyError or safetensors errors for a bad folder
        raise ModelError(f"{folder}: cannot be loaded as {kind.__name__}: {error}") from error
    wrong = {name: keys for name, keys in info.items() if keys}
    if wrong:
        raise ModelError(f"{folder}: does not fit {kind.__name__} exactly: {wrong}")
    return model


def load_network(folder: Path, dtype: torch.dtype = torch.float32, variant: str = "") -> ModelMixin:
    """The denoiser of a weights folder, of the class that its config.json names, every key matched. Raises
    ModelError."""
    folder = Path(folder)
    family = network_family(read_json(folder / "config.json"), str(folder))
    return _load_strict(family.network, folder, dtype, variant, "diffusion_pytorch_model")


def load_vae(pipeline: Path, dtype: torch.dtype = torch.float32, variant: str = "") -> AutoencoderKL:
    """The autoencoder of a pipeline folder, frozen, in evaluation mode. Raises ModelError."""
    vae = _load_strict(AutoencoderKL, Path(pipeline) / "vae", dtype, variant, "diffusion_pytorch_model")
    return vae.eval().requires_grad_(False)


def load_text(pipeline: Path, dtype: torch.dtype, device: torch.device, variant: str = "") -> DiffusionPipeline:
    """The pipeline without denoiser and VAE: tokenizers and text encoders, every key matched, frozen, on the device.
    Raises ModelError."""
    pipeline = Path(pipeline)
    family, index = family_of(pipeline), read_json(pipeline / "model_index.json")
    config = read_json(pipeline / family.part / "config.json")
    absent = [name for name, kind in index.items() if isinstance(kind, list) and kind[0] is None]
    parts = dict.fromkeys((*absent, *family.unused, "vae")) | {family.part: family.stand_in(config)}
    for name in text_encoders(index):
        kind = getattr(transformers, index[name][1])
        parts[name] = (
            _load_strict(kind, pipeline / name, dtype, variant, "model").eval().requires_grad_(False).to(device)
        )
    try:
        return family.pipeline.from_pretrained(pipeline, **parts)
    except Exception as error:  # as above: the library's own errors name neither the part nor the way out
        raise ModelError(f"pipeline {pipeline}: its text encoders cannot be loaded: {error}") from error


def text_encoders(index: dict) -> list[str]:
    """The text encoders that a model_index.json names (SD3's third may be null)."""
    return [name for name, kind in index.items() if name.startswith("text_encoder") and kind[0] is not None]


def load_schedule(pipeline: Path, shift: float = 1.0) -> Schedule:
    """The diffusion schedule and prediction type of a pipeline folder; `shift`: of timesteps drawn for training. Raises
    ModelError."""
    return Schedule.from_config(read_json(Path(pipeline) / "scheduler" / "scheduler_config.json"), shift)


def weights_hash(folder: Path, variant: str = "") -> str:
    """sha256 over a weights folder's safetensors files, in name order, as hexadecimal. Raises ModelError."""
    digest = hashlib.sha256()
    for file in weight_files(folder, variant):
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


def one_step_scheduler(source: Path, timestep: int) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """A scheduler whose single step starts at the conditioning timestep and ends at x0, so that a plain pipeline call
    needs no `timesteps=`.

    With betas it is the teacher's schedule cut off behind t_g: with trailing spacing one step starts at its last
    timestep, which is t_g, and with `set_alpha_to_one` that step returns x0 itself. A flow's always starts at sigma = 1,
    which is why that is a flow generator's only conditioning timestep.
    """
    config = read_json(Path(source) / "scheduler" / "scheduler_config.json")
    if config["_class_name"] == FLOW:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config["num_train_timesteps"], shift=1.0)
    full = DDIMScheduler.from_config(config)
    return DDIMScheduler(
        num_train_timesteps=timestep + 1,
        trained_betas=full.betas[: timestep + 1].tolist(),
        prediction_type=config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        steps_offset=1,  # not used by trailing spacing; SD's pipeline warns of any other value
        clip_sample=False,
        set_alpha_to_one=True,
    )


def _copy_part(source: Path, out: Path, variant: str) -> None:
    """Copies one part of a pipeline: its weights (of the variant, under plain names) and all that is not weights."""
    skip = shutil.ignore_patterns(
        "*.safetensors*", "*.bin", "*.bin.index*.json", "*.ckpt", "*.onnx*", "*.msgpack", "*.h5", ".*"
    )
    shutil.copytree(source, out, ignore=skip)
    stem = next((s for s in ("diffusion_pytorch_model", "model") if any(source.glob(f"{s}*.safetensors"))), None)
    if stem is None:
        return  # a tokenizer
    files = weight_files(source, variant, stem)
    variant = _variant_of(files, variant)
    for file in files:
        shutil.copyfile(file, out / (file.name.replace(f".{variant}", "") if variant else file.name))
    index = source / variant_name(f"{stem}.safetensors.index.json", variant or "")
    if len(files) > 1:
        text = index.read_text()
        (out / f"{stem}.safetensors.index.json").write_text(text.replace(f".{variant}", "") if variant else text)


def write_one_step_pipeline(
    source: Path, network: Path, timestep: int, out: Path, note: dict, variant: str = ""
) -> None:
    """Writes a pipeline folder with the denoiser of the folder `network`, all else from `source`, for one step at
    `timestep`. Only the parts that model_index.json names are copied; a part that is not there (the hub's safety checker
    is not fetched) is left out of the index.

    `note` is kept as disback.json. Atomic: an existing pipeline at `out` is replaced as a whole.
    """
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    index, own = read_json(source / "model_index.json"), family_of(source).part
    for part in [name for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None]:
        if part == own:
            _copy_part(network, temporary / own, variant)
        elif part == "scheduler":
            scheduler = one_step_scheduler(source, timestep)
            scheduler.save_pretrained(temporary / part)
            index[part] = ["diffusers", type(scheduler).__name__]
        elif (source / part).is_dir():
            _copy_part(source / part, temporary / part, variant)
        else:
            index[part] = [None, None]
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (temporary / NOTE).write_text(json.dumps({"conditioning_timestep": timestep, **note}, indent=2) + "\n")
    replace_folder(temporary, out)
