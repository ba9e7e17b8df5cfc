"""Pipelines by name: a local folder, or a model of the Hugging Face hub."""

import re
from pathlib import Path

import huggingface_hub
import torch

from models.families import FAMILIES
from trainer.distributed.world import World, sum_over_ranks
from trainer.errors import UserError

HUB_ID = re.compile(r"(?!.*\.(?:safetensors|ckpt|bin|pt)$)\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")  # OWNER/NAME, no file
FETCHING = "another process of this node failed to fetch it: see its message"


def _patterns(variant: str) -> dict[str, list[str]]:
    """The files of a repository that are needed: configurations, tokenizers, the safetensors of one variant, and the licence,
    for the generator's model card."""
    parts = {"vae", "scheduler"} | {f.part for f in FAMILIES.values()}
    parts |= {f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    if variant:
        weights = [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors", f"*.index.{variant}.json"]
        other = []
    else:
        weights, other = ["*.safetensors"], ["*/*.*.safetensors", "*/*.*-*-of-*.safetensors"]
    kinds = [
        *weights,
        "*config.json",
        "*.safetensors.index.json",
        "token*",
        "vocab*",
        "merges*",
        "spiece*",
        "special*",
        "added*",
    ]
    return {
        "allow_patterns": ["model_index.json", "README.md", "LICENSE*"]
        + [f"{part}/{kind}" for part in sorted(parts) for kind in kinds],
        "ignore_patterns": other,
    }


def _snapshot(name: str, variant: str, key: str, offline: bool) -> Path:
    """The cached folder of a hub model, downloaded unless offline. Raises UserError."""
    repository, _, revision = name.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, local_files_only=offline, **_patterns(variant)
            )
        )
    except (
        Exception
    ) as error:  # the hub's, the network's or the file system's: all mean that the model is not available
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{key}={name}: no such folder, and no such hub model in the cache or on the network "
            f"({type(error).__name__}: {reason}); give a pipeline folder, or download the model once on a machine with network access"
        ) from error


def local_pipeline(name: str, variant: str, key: str, world: World) -> Path:
    """The local folder of the pipeline that the setting `key` names: that folder, or the snapshot of a hub model.

    One process per node downloads what is missing (unless HF_HUB_OFFLINE is set); the others then read its cache. Every
    rank must call it: if one fails, all raise UserError.
    """
    problem, folder = None, Path(name)
    remote = not folder.is_dir() and HUB_ID.fullmatch(name) is not None
    if remote and world.local_rank == 0:
        try:
            folder = _snapshot(name, variant, key, offline=False)
        except UserError as error:
            problem = error
    failed = sum_over_ranks(torch.tensor([float(problem is not None)], device=world.device), world)
    if problem is not None:
        raise problem
    if float(failed):
        raise UserError(f"{key}={name}: {FETCHING}")
    if remote and world.local_rank != 0:
        folder = _snapshot(name, variant, key, offline=True)
    return folder
