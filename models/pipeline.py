"""Loading of diffusers pipeline folders: strict weights, networks without weights, hashes."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from torch import nn

from models.diffusion import Schedule
from models.errors import ModelError
from models.families import family_of, network_family
from models.files import STEM, read_json, variant_of, weight_files


def _load_strict(kind: type, folder: Path, dtype: torch.dtype, variant: str, stem: str) -> nn.Module:
    """from_pretrained, but missing or unexpected keys are errors: the libraries would continue with random weights."""
    variant = variant_of(weight_files(folder, variant, stem), variant)
    try:
        model, info = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, variant=variant, output_loading_info=True
        )
    except Exception as error:  # OSError, ValueError, KeyError or safetensors' own type
        raise ModelError(f"{folder}: cannot be loaded as {kind.__name__}: {error}") from error
    wrong = {name: keys for name, keys in info.items() if keys}
    if wrong:
        raise ModelError(f"{folder}: its keys do not match {kind.__name__}: {wrong}")
    return model


def load_network(folder: Path, dtype: torch.dtype = torch.float32, variant: str = "") -> ModelMixin:
    """The denoiser of a weights folder, of the class in its config.json, loaded strictly. Raises ModelError."""
    folder = Path(folder)
    family = network_family(read_json(folder / "config.json"), str(folder))
    return _load_strict(family.network, folder, dtype, variant, STEM)


def empty_network(folder: Path) -> ModelMixin:
    """The denoiser of a weights folder without its weights: parameters on the meta device, buffers computed. Takes no
    memory until the weights are loaded into it. Raises ModelError."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    family = network_family(config, str(folder))
    try:
        with init_empty_weights(include_buffers=False):
            return family.network.from_config(config)
    except Exception as error:  # as in _load_strict
        raise ModelError(f"{folder}: its config.json does not fit a {family.network.__name__}: {error}") from error


def load_vae(pipeline: Path, dtype: torch.dtype = torch.float32, variant: str = "") -> AutoencoderKL:
    """The autoencoder of a pipeline folder, frozen and in evaluation mode. Raises ModelError."""
    vae = _load_strict(AutoencoderKL, Path(pipeline) / "vae", dtype, variant, STEM)
    return vae.eval().requires_grad_(False)


def load_text(pipeline: Path, dtype: torch.dtype, device: torch.device, variant: str = "") -> DiffusionPipeline:
    """The pipeline without denoiser and VAE: tokenizers, and text encoders loaded strictly, frozen, on the device.
    Raises ModelError."""
    pipeline = Path(pipeline)
    family, index = family_of(pipeline), read_json(pipeline / "model_index.json")
    config = read_json(pipeline / family.part / "config.json")
    absent = [name for name, kind in index.items() if isinstance(kind, list) and kind[0] is None]
    parts = dict.fromkeys((*absent, *family.unused, "vae")) | {family.part: family.placeholder(config)}
    for name in text_encoders(index):
        kind = getattr(transformers, index[name][1])
        encoder = _load_strict(kind, pipeline / name, dtype, variant, "model")
        parts[name] = encoder.eval().requires_grad_(False).to(device)
    try:
        return family.pipeline.from_pretrained(pipeline, **parts)
    except Exception as error:  # as above; the library's errors do not name the folder
        raise ModelError(f"pipeline {pipeline}: its text encoders cannot be loaded: {error}") from error


def text_encoders(index: dict) -> list[str]:
    """The text encoders in a valid model_index.json (SD3's third may be [null, null])."""
    return [name for name, kind in index.items() if name.startswith("text_encoder") and kind[0] is not None]


def load_schedule(pipeline: Path, shift: float = 1.0) -> Schedule:
    """The noise schedule of a pipeline folder. shift: of the training timesteps. Raises ModelError."""
    return Schedule.from_config(read_json(Path(pipeline) / "scheduler" / "scheduler_config.json"), shift)


def files_hash(files: Sequence[Path]) -> str:
    """The sha256 (hexadecimal) over the contents of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


def weights_hash(
    folder: Path, variant: str = "", stem: str = STEM, digest: Callable[[Sequence[Path]], str] = files_hash
) -> str:
    """The sha256 (hexadecimal) over a weights folder's safetensors files in name order; other arguments as in
    `weight_files`. digest: `files_hash`, or a function that remembers what it has hashed. Raises ModelError."""
    return digest(weight_files(folder, variant, stem))


def pipeline_hash(
    pipeline: Path, variant: str = "", weights_digest: Callable[[Sequence[Path]], str] = files_hash
) -> str:
    """A sha256 (hexadecimal) over what a pipeline folder's images depend on besides the denoiser: the weights of autoencoder
    and text encoders, and all configurations and vocabularies. weights_digest: as in `weights_hash`. Raises ModelError."""
    digest, own = hashlib.sha256(), family_of(pipeline).part
    for part in sorted(folder for folder in Path(pipeline).iterdir() if folder.is_dir() and folder.name != own):
        stems = [s for s in (STEM, "model") if any(part.glob(f"{s}*.safetensors"))]
        weights = [weights_hash(part, variant, stem, weights_digest) for stem in stems]
        digest.update(f"{part.name} {weights}\n".encode())
        for file in sorted(part.glob("*")):
            if file.suffix in (".json", ".txt", ".model"):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def replace_folder(temporary: Path, final: Path) -> None:
    """Renames a finished folder to its final name. Readers see the old one, none, or the new one, never a part."""
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(temporary, final)
        shutil.rmtree(old)
    else:
        os.replace(temporary, final)
