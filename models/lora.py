"""Low-rank adaptation (LoRA, Hu et al. 2021): y = W x + alpha / rank * B A x, with W frozen and only A and B trained.

The layers are peft's. A LoRA folder has `pytorch_lora_weights.safetensors` with the keys of diffusers'
`save_lora_weights` (`unet.<module>.lora_A.weight`), so that `pipe.load_lora_weights(folder)` loads it, peft's
`adapter_config.json`, and `disback.json` with the sha256 of the base network.
"""

import hashlib
import json
from enum import Enum
from pathlib import Path

import torch
from diffusers import ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from torch import nn

from models.errors import ModelError
from models.files import INFO_FILE, read_json, weight_files
from models.lora_files import read_lora
from models.pipeline import load_network, weights_hash
from models.settings import LORA_TARGETS, LoraSettings

ADAPTER = "default"  # peft's name for the only adapter of a network


def check_targets(folder: Path, settings: LoraSettings, variant: str = "") -> None:
    """Raises ModelError unless each target is the end of a linear or convolution layer's name in a weights folder.
    Reads only the headers of its files."""
    names = set()
    for file in weight_files(folder, variant):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                if key.endswith(".weight") and len(handle.get_slice(key).get_shape()) in (2, 4):
                    names.add(key.removesuffix(".weight"))
    check_target_names(names, settings, str(folder))


def check_target_names(names: set[str], settings: LoraSettings, where: str) -> None:
    """Raises ModelError unless each target is the end of a name. names: of the linear and convolution layers of the network
    that `where` tells."""
    if not settings.targets:
        raise ModelError("lora.targets is empty: name modules, for example [to_q, to_k, to_v, to_out.0]")
    missing = [t for t in settings.targets if not any(n == t or n.endswith("." + t) for n in names)]
    if missing:
        ends = {n.rpartition(".")[2] for n in names}
        known = [t for t in LORA_TARGETS if any(n.endswith("." + t) for n in names)]
        known = known or sorted(e for e in ends if e[0] > "9")
        raise ModelError(
            f"lora.targets: {where} has no linear or convolution layer named {', '.join(missing)}; it has, for "
            f"example, {', '.join(known[:8])}"
        )


def add_adapter(
    net: nn.Module,
    settings: LoraSettings,
    seed: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Adds an adapter to a network in place: A from peft's default (Kaiming), B zero, so the outputs do not change yet.

    Each A is a function of the seed and its name: the same on every rank and device, whatever was drawn before.
    device, dtype: of the adapter, by default the network's; on a network on the meta device, only the adapter gets
    memory. The network must not be sharded yet: peft reads the shapes of its weights.
    """
    net.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft initialises from the global generator
        inject_adapter_in_model(peft_config(settings), net, ADAPTER)
    net._hf_peft_config_loaded = True  # as in diffusers' add_adapter: its adapter methods check it
    for key, parameter in adapter_parameters(net).items():
        value = torch.zeros(parameter.shape)
        if ".lora_A." in key:
            digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
        module, _, name = key.partition(".")[2].rpartition(".")
        layer = net.get_submodule(f"{module}.{ADAPTER}")
        setattr(layer, name, nn.Parameter(value.to(device or parameter.device, dtype or parameter.dtype)))


def peft_config(settings: LoraSettings) -> LoraConfig:
    """The settings as a peft configuration."""
    own = settings.identity()
    return LoraConfig(r=own["rank"], lora_alpha=own["alpha"], target_modules=own["targets"])


def base_key(key: str) -> str:
    """The name of an adapted layer's weight in a weights folder."""
    return key.replace(".base_layer.", ".")


def adapter_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in a LoRA file; empty without an adapter. `net` may wrap the network."""
    module = _adapted_network(net)
    if module is None:
        return {}
    return {
        f"{_part(module)}.{name.replace(f'.{ADAPTER}.', '.')}": parameter
        for name, parameter in module.named_parameters()
        if ".lora_" in name
    }


def _adapted_network(net: nn.Module) -> nn.Module | None:
    """The network with the adapter: `net` itself or one inside it."""
    return next((module for module in net.modules() if hasattr(module, "peft_config")), None)


def _part(module: nn.Module) -> str:
    """The network's name in a diffusers pipeline."""
    return "unet" if "UNet" in type(module).__name__ else "transformer"


def adapter_metadata(net: nn.Module) -> tuple[dict[str, str], str]:
    """The metadata of a LoRA file (diffusers reads alpha from it) and the text of adapter_config.json."""
    module = _adapted_network(net)
    config = {k: _jsonable(v) for k, v in module.peft_config[ADAPTER].to_dict().items()}
    header = json.dumps({f"{_part(module)}.{k}": v for k, v in config.items()}, sort_keys=True)
    return {"lora_adapter_metadata": header}, json.dumps(config, indent=2, sort_keys=True) + "\n"


def _jsonable(value: object) -> object:
    """A JSON value. Sets are sorted: their order differs between processes, which would change the file's hash."""
    if isinstance(value, set):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


@torch.no_grad()
def merge(net: ModelMixin, folder: Path) -> None:
    """Merges a LoRA folder or file into the weights of a plain network, in place: W <- W + scale * B A.

    Summed in float32 and rounded once to the network's dtype. Raises ModelError for a key or shape mismatch.
    """
    for name, (down, up, scale) in read_lora(folder, net).items():
        try:
            weight = net.get_submodule(name).weight
            # A convolution's A has its kernel size and its B is 1 x 1: flattened, they multiply as in a linear layer.
            delta = up.float().flatten(1) @ down.float().flatten(1)
            merged = weight.float() + scale * delta.view(weight.shape).to(weight.device)
        except (AttributeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{folder}: does not fit the network: module '{name}': {error}") from error
        weight.copy_(merged)


def load_merged(base: Path, adapter: Path, dtype: torch.dtype, variant: str = "") -> ModelMixin:
    """The network of a weights folder with a LoRA folder or file merged into it. Raises ModelError, also if the adapter was
    trained on another base."""
    file = Path(adapter) / INFO_FILE
    info = read_json(file) if file.is_file() else {}
    if info.get("base") not in (None, weights_hash(base, variant)):
        raise ModelError(
            f"{adapter} was trained on another network (sha256 {info['base'][:12]}...) than {base}: set `pipeline` and "
            "`generator_start` as in its training"
        )
    net = load_network(base, dtype, variant)
    merge(net, adapter)
    return net
