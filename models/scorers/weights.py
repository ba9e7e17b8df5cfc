"""Reads the weights of published networks from local files, without running code from them."""

import pickle
import textwrap
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from models.errors import ModelError
from models.files import refuse_pointer

Network = TypeVar("Network", bound=nn.Module)
Pretrained = TypeVar("Pretrained", bound=PreTrainedModel)


def reason(error: Exception) -> str:
    """Why weights could not be read, in one line: what the libraries say fills paragraphs."""
    if isinstance(error, pickle.UnpicklingError):
        return "is damaged, or holds Python objects besides tensors, which are not loaded because they can run code"
    if "TorchScript" in str(error):
        return "is a TorchScript archive, which is not loaded because it is a program"
    if isinstance(error, EOFError) or "PytorchStreamReader" in str(error):
        return "is damaged or incomplete: download it again"
    return "cannot be read: " + textwrap.shorten(str(error) or type(error).__name__, 200)


def read_weights(file: Path) -> dict:
    """The contents of a .safetensors file, or of a `torch.save` file of tensors and plain values, on the CPU.

    Raises ModelError for a missing, damaged or truncated file, and for one with other Python objects.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such file of weights")
    refuse_pointer(file)
    try:
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a damaged pickle fails with almost any exception
        raise ModelError(f"{file}: {reason(error)}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{file}: holds a {type(state).__name__}, not a dict of weights by name")
    return state


def load_strictly(network: nn.Module, state: dict[str, Tensor], file: Path, what: str, assign: bool = False) -> None:
    """Loads all weights of a network. what: the network, for the message. assign: the network takes the tensors
    themselves, for one that was built on the meta device.

    Raises ModelError if a weight is missing, left over or of another shape.
    """
    try:
        network.load_state_dict(state, assign=assign)
    except (RuntimeError, TypeError, AttributeError) as error:  # the last two: values that are not tensors
        found = textwrap.shorten(" ".join(str(error).splitlines()[1:]) or str(error), 200)
        raise ModelError(f"{file}: is not a file of {what}: {found}") from error


def frozen(network: Network, device: torch.device) -> Network:
    """The network in float32, for inference on a device."""
    return network.float().to(device).eval().requires_grad_(False)


def load_pretrained(kind: type[Pretrained], folder: Path, device: torch.device) -> Pretrained:
    """A transformers model in float32 from a folder with its config.json and weights, frozen, for inference.

    Raises ModelError if the folder lacks either, if a file is damaged, or if it has not all weights of this model.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: has no config.json: use the folder of a {kind.__name__} from the Hugging Face hub")
    for file in sorted(folder.glob("*")):
        refuse_pointer(file)
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()  # its table of unused weights fills a screen; what counts is checked below
        network, found = kind.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name one below
        )
    except Exception as error:  # of several libraries, see read_weights
        raise ModelError(f"{folder}: {reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    lacking = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if lacking:  # transformers only warns, and scores with random weights
        raise ModelError(
            f"{folder}: lacks {len(lacking)} weights of a {kind.__name__} (such as {lacking[0]}), or has them in "
            "another shape: download it again"
        )
    return frozen(network, device)
