"""LoRA files as people have them: ours, diffusers', peft's and kohya's, read into one form.

The scale of a layer is alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023). alpha comes from where the tool
keeps it: peft's adapter_config.json, the same in the metadata of diffusers' files, or a number beside each layer (kohya).
Without any of them the scale is 1, as in diffusers.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from models.errors import ModelError
from models.families import network_family
from models.files import ADAPTER_CONFIG, LORA_FILE, PEFT_FILE, read_json, weight_files
from models.tensorfile import TensorFile

KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
TEXT = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
PREFIXES = ("unet.", "transformer.", "base_model.model.")  # diffusers' two, and peft's
OTHER_KINDS = {  # what the keys of other adapters contain
    "DoRA": ("lora_magnitude_vector", "dora_scale"),
    "LoHa or LoKr (LyCORIS)": ("hada_w", "lokr_w"),
    "LoCon with a Tucker core": ("lora_mid", "lora_t1"),
    "LoRA with biases": (".lora_B.bias", ".lora_up.bias"),
}


class LoraLayer(NamedTuple):
    """The update of one layer: scale * up @ down."""

    down: Tensor
    up: Tensor
    scale: float


def is_adapter(path: Path) -> bool:
    """Whether a path is a LoRA folder, or a single LoRA file."""
    path = Path(path)
    if path.is_file():
        return path.suffix == ".safetensors" and _kind(path) != ""
    return any((path / name).is_file() for name in (LORA_FILE, PEFT_FILE))


def describe_file(path: Path) -> str:
    """What a LoRA folder or a single file is, for a message."""
    if path.is_file() and path.suffix != ".safetensors":
        return f"a single {path.suffix or 'unnamed'} file"
    file = path if path.is_file() else weight_files(path)[0]
    if kind := _kind(file):
        return f"a LoRA ({kind})"
    whole = any(key.startswith("model.diffusion_model.") for key in _keys(weight_files(file)[0]))
    return "a whole model in one file" if whole else "a single file of weights"


def read_lora(path: Path, net: ModelMixin) -> dict[str, LoraLayer]:
    """The layers of a LoRA folder or file by their names in the network that it is for. Raises ModelError for a file that is
    damaged, is no LoRA, also changes text encoders, or is of a kind that is not supported."""
    path, file = Path(path), weight_files(path)[0]
    try:
        with safe_open(file, framework="pt") as handle:
            state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a mapping)
            metadata = handle.metadata() or {}
    except Exception as error:  # safetensors' error type is not public
        raise ModelError(f"{path}: not a complete LoRA file: {error}") from error
    kind = _kind(file)
    for name, parts in OTHER_KINDS.items():
        if any(part in key for key in state for part in parts):
            raise ModelError(f"{path}: a {name}, which is not supported: use a plain LoRA")
    if not kind:
        raise ModelError(f"{path}: {file.name} is not a LoRA: its keys are such as {next(iter(state), 'none')}")
    if text := [key for key in state if key.startswith(TEXT) or (key.startswith(KOHYA) and "unet" not in key)]:
        raise ModelError(
            f"{path}: a LoRA ({kind}) that also changes the text encoders ({text[0]}), which are not trained here: use one "
            "without, or fuse it into a pipeline folder with diffusers"
        )
    if kind == "kohya's":
        state = _from_kohya(path, net, state)
    state, alphas = _peft_keys(state)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, matrix = key.rpartition(".lora_")
        pairs.setdefault(name, {})[matrix] = value
    if lost := sorted(alphas.keys() - pairs.keys()):
        raise ModelError(f"{path}: has alpha for module '{lost[0]}', but no matrices: download it again")
    config = _config(path, metadata)
    layers = {}
    for name, pair in pairs.items():
        if pair.keys() != {"A.weight", "B.weight"}:
            raise ModelError(
                f"{path}: does not fit the network: module '{name}': has {sorted(pair)} where A.weight and B.weight are "
                "expected"
            )
        down, up = pair["A.weight"], pair["B.weight"]
        layers[name] = LoraLayer(down, up, _scale(path, name, len(down), config, alphas))
    return layers


def _keys(file: Path) -> tuple[str, ...]:
    opened = TensorFile(file)
    opened.close()
    return tuple(opened.shapes)


def _kind(file: Path) -> str:
    """Whose LoRA format a safetensors file has; empty if it is none. Raises ModelError for a damaged file."""
    keys = _keys(weight_files(file)[0])
    if any(key.startswith(KOHYA) for key in keys):
        return "kohya's"
    if any(part in key for key in keys for parts in OTHER_KINDS.values() for part in parts):
        return next(name for name, parts in OTHER_KINDS.items() if any(p in key for key in keys for p in parts))
    if any(key.startswith("base_model.model.") and ".lora_" in key for key in keys):
        return "peft's"
    return "diffusers'" if any(".lora_A." in key or "lora.down." in key for key in keys) else ""


def _from_kohya(path: Path, net: ModelMixin, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' keys for kohya's, the numbers alpha included."""
    family = network_family({**net.config, "_class_name": type(net).__name__}, str(path))
    try:
        state, alphas = family.pipeline.lora_state_dict(state, unet_config=net.config)
    except Exception as error:  # whatever the conversion of a strange key raises
        raise ModelError(f"{path}: a LoRA (kohya's) that diffusers cannot convert: {error}") from error
    return state | {key: torch.tensor(float(alpha)) for key, alpha in (alphas or {}).items()}


def _peft_keys(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The matrices by peft's keys (MODULE.lora_A.weight), and the numbers alpha by module."""
    state = convert_unet_state_dict_to_peft({_plain(key): value for key, value in state.items()})
    alphas = {key: float(state.pop(key)) for key in list(state) if key.endswith(".alpha")}
    return state, {key.removesuffix(".alpha").partition(".lora_")[0]: alpha for key, alpha in alphas.items()}


def _plain(key: str) -> str:
    """A key without the network's name in front."""
    return next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)


def _config(path: Path, metadata: dict[str, str]) -> dict:
    """peft's configuration of a LoRA folder or file; empty if it has none."""
    file = path / ADAPTER_CONFIG
    if path.is_dir() and file.is_file():
        config = read_json(file)
    else:
        try:
            config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except ValueError as error:
            raise ModelError(f"{path}: its lora_adapter_metadata is not JSON: {error}") from error
        config = {_plain(key): value for key, value in config.items()}
    kind = config.get("peft_type", "LORA")
    if kind != "LORA" or config.get("use_dora"):
        kind = "DORA" if kind == "LORA" else kind
        raise ModelError(f"{path}: {ADAPTER_CONFIG} describes a {kind}, which is not supported: use a plain LoRA")
    return config


def _scale(path: Path, name: str, rank: int, config: dict, alphas: dict[str, float]) -> float:
    """The factor of a layer's product, as peft computes it. rank: of its matrices."""
    if name in alphas:
        return alphas[name] / rank
    if "lora_alpha" not in config:
        return 1.0
    try:
        alpha, stated = (
            (config.get(f"{key}_pattern") or {}).get(get_pattern_key(config.get(f"{key}_pattern") or {}, name), default)
            for key, default in (("alpha", config["lora_alpha"]), ("rank", config.get("r", rank)))
        )
        if stated != rank:
            raise ModelError(
                f"{path}: {name} has rank {rank}, its configuration says {stated}: copy file and configuration together"
            )
        return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: its LoRA configuration gives no scale for {name}: {error}") from error
