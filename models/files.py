"""Files of pipeline and LoRA folders: their names, JSON, and the weight files that every reader of a folder takes."""

import json
import re
from pathlib import Path

from models.errors import ModelError
from models.tensorfile import TensorFile

STEM = "diffusion_pytorch_model"
WEIGHTS_FILE = f"{STEM}.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_FILE = "adapter_model.safetensors"  # peft's
ADAPTER_CONFIG = "adapter_config.json"  # peft's
LORA_FOLDER = "lora"  # in an exported pipeline: an unmerged LoRA
INFO_FILE = "disback.json"  # describes an exported pipeline or a LoRA folder
POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(file: Path) -> None:
    """Raises ModelError if git left a pointer where Git LFS stores the file. An unreadable file is the reader's to report."""
    try:
        with file.open("rb") as handle:
            pointer = handle.read(len(POINTER)) == POINTER
    except OSError:
        return
    if pointer:
        raise ModelError(
            f"{file}: only the Git LFS pointer of this file is here: run `git lfs install` and then `git lfs pull` in the "
            "clone, or download the model with `hf download`"
        )


def read_json(file: Path) -> dict:
    """Reads a JSON object from a configuration file. Raises ModelError if it is missing or something else."""
    refuse_pointer(file)
    try:
        value = json.loads(file.read_bytes().decode())
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # JSON's, or the decoder's
        raise ModelError(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds a JSON {type(value).__name__}, an object is expected: copy it from the model")
    return value


def variant_name(name: str, variant: str) -> str:
    """The file name of a variant in diffusers and transformers: a.safetensors -> a.fp16.safetensors, and for an index
    a.safetensors.index.json -> a.safetensors.index.fp16.json. Unchanged without a variant."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def variant_of(files: list[Path], variant: str) -> str | None:
    """The variant if these files belong to it, else None."""
    return variant if variant and f".{variant}" in files[0].name else None


def weight_files(folder: Path, variant: str = "", stem: str = STEM) -> list[Path]:
    """The safetensors files of a weights or LoRA folder, as every reader takes them: one, or those in its index. Of a path to
    a single file, that file.

    variant: preferred if the folder has files of it (nodes and checkpoints have no variants). stem: "model" for a text
    encoder. Raises ModelError, also for a folder whose files leave open which ones count (diffusers and transformers
    decide differently), and for files that are no weights to train from.
    """
    folder = Path(folder)
    if folder.is_file():
        return _usable([folder])
    for name in dict.fromkeys((variant, "")):
        found = _candidates(folder, name, stem)
        if len({tuple(files) for files in found.values()}) > 1:
            raise ModelError(
                f"{folder}: has both {' and '.join(found)}, of which some readers take one and some the other: delete the "
                "outdated one (of an index also its shards)"
            )
        for files in found.values():
            return _usable(files)
    raise ModelError(f"{folder}: {_what_is_missing(folder, variant, stem)}")


def _candidates(folder: Path, variant: str, stem: str) -> dict[str, list[Path]]:
    """What a reader could take: the files of the weights, by the name of the file that decides for them."""
    names = [variant_name(f"{stem}.safetensors", variant)]
    names += (LORA_FILE, PEFT_FILE) if stem == STEM and not variant else ()
    found = {name: [folder / name] for name in names if (folder / name).is_file()}
    index = folder / variant_name(f"{stem}.safetensors.index.json", variant)
    return found | ({index.name: _indexed(index)} if index.is_file() else {})


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    content = read_json(index)
    parts = content.get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(p, str) for p in parts.values()):
        raise ModelError(f"{index}: its weight_map does not name the file of each weight: download it again")
    if not isinstance(content.get("metadata"), dict):  # diffusers would stop at it
        raise ModelError(f'{index}: has no "metadata": download it again, or add "metadata": {{}}')
    return [index.parent / part for part in sorted(set(parts.values()))]


def _usable(files: list[Path]) -> list[Path]:
    """The files, if each is complete safetensors of a usable precision. Raises ModelError."""
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file.parent}: {file.name} is listed in the index but missing: download it again")
        refuse_pointer(file)
        TensorFile(file).close()
    return files


def _what_is_missing(folder: Path, variant: str, stem: str) -> str:
    """Why a folder has no weight files, and what to do."""
    if not folder.is_dir():
        return "no such folder of weights"
    named = re.compile(
        rf"{re.escape(stem)}(?:\.safetensors\.index\.([\w-]+)\.json|\.([\w-]+?)(?:-\d+-of-\d+)?\.safetensors)"
    )
    names = sorted(file.name for file in folder.iterdir())
    if variants := sorted({match[1] or match[2] for name in names if (match := named.fullmatch(name))}):
        return f"has weights of the variant {', '.join(variants)} only: set " + " or ".join(
            f"variant={name}" for name in variants
        )
    if any(re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.safetensors", name) for name in names):
        return f"has shards, but not their {stem}.safetensors.index.json: download it again"
    if any(name.endswith(".bin") for name in names):
        return (
            "the weights are pickle files (*.bin), which can execute code; convert the pipeline once: "
            "python -c \"from diffusers import DiffusionPipeline as P; P.from_pretrained('PIPELINE', "
            "use_safetensors=False).save_pretrained('CONVERTED', safe_serialization=True)\""
        )
    wanted = f"{stem}.safetensors nor its index"
    return f"has neither {wanted}" + (f", with or without the variant {variant}" if variant else "")
