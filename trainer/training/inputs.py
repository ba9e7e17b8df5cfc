"""Inputs of a stage from its shards: images and captions, or latents and text states encoded ahead of time."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from data.loader import Batch
from data.settings import DataSettings
from data.sources import encoding_of_training
from models.files import read_json
from models.offload import offload_to_cpu
from models.pipeline import files_hash, text_encoders, weights_hash
from models.sampler import Sampler
from trainer.distributed.world import from_main
from trainer.errors import UserError
from trainer.training.run import Run

PARTS = {"vae": "autoencoder", "text": "text encoders"}


def fingerprint(
    pipeline: Path, part: str, variant: str, weights_digest: Callable[[Sequence[Path]], str] = files_hash
) -> str:
    """Hash of the weights of a pipeline folder's "vae" or, all together, "text" encoders. weights_digest: as in
    `weights_hash`. Raises ModelError."""
    if part == "vae":
        return weights_hash(pipeline / "vae", variant, digest=weights_digest)
    digest = hashlib.sha256()
    for name in text_encoders(read_json(pipeline / "model_index.json")):
        digest.update(f"{name} {weights_hash(pipeline / name, variant, 'model', weights_digest)} ".encode())
    return digest.hexdigest()


def choose_inputs(run: Run, images: bool, pipeline: Path) -> tuple[str, ...]:
    """What a training stage reads from `data.train`: captions, images if it needs any, and instead of them latents and text
    states if the shards hold those of this pipeline.

    Raises UserError for shards that another autoencoder or text encoder encoded, or if data.cached=require finds something
    missing; DataError if the first shard cannot be read.
    """
    data, plain = run.settings.data, ("image", "caption") if images else ("caption",)
    if data.cached == "off":
        return plain
    record = encoding_of_training(data)
    if record is None:
        if data.cached == "require":
            raise UserError(
                "data.cached=require, but data.train names shards that are not encoded: encode them with `disback shards "
                "--encode`, or set data.cached=auto"
            )
        return plain
    if data.cached == "require" and not record["text"]:
        raise UserError(
            "data.cached=require, but the shards of data.train hold no text states: encode them with `disback shards "
            "--encode ... --text`, or set data.cached=auto"
        )
    _check_selection(data, record, images)
    if images and not data.buckets and record["resolution"] != data.resolution:
        raise UserError(
            f"the encoded shards of data.train have resolution {record['resolution']}, but data.resolution="
            f"{data.resolution}: encode them at that resolution, or set data.resolution={record['resolution']}"
        )
    for part in ("vae",) * images + ("text",) * bool(record["text"]):
        hashed = fingerprint(pipeline, part, run.settings.variant, run.digest) if run.world.main else None
        mine = from_main(hashed, run.world)
        if record[part] != mine:
            raise UserError(
                f"the shards of data.train were encoded by another {PARTS[part]} (sha256 {str(record[part])[:12]}) than that of "
                f"{pipeline} ({mine[:12]}): encode them with `disback shards --encode ... --pipeline {pipeline}` (and "
                "the run's --variant)"
            )
    return "caption", *("latents",) * images, *("text",) * bool(record["text"])


def _check_selection(data: DataSettings, record: dict, images: bool) -> None:
    """Raises UserError for encoded shards of other buckets than the run's, or for crops and flips that come too late."""
    mine, theirs = [list(size) for size in data.selection.buckets], record.get("buckets") or []
    if mine != theirs:
        raise UserError(
            f"the encoded shards of data.train have {f'the buckets {theirs}' if theirs else 'no buckets'}, but data.buckets "
            f"{f'are {mine}' if mine else 'is empty'}: encode them with the run's buckets, or set data.buckets={theirs}"
        )
    if images and (data.flip or data.crop == "random"):
        raise UserError(
            "data.crop=random and data.flip=true change images, but data.train names encoded shards: leave them out, or train "
            "from images (data.cached=off)"
        )


def offload_unused(sampler: Sampler, inputs: tuple[str, ...]) -> None:
    """Moves what the training steps do not use to the CPU; previews fetch it from there."""
    if "image" not in inputs:
        offload_to_cpu([sampler.vae])
    if "text" in inputs:
        offload_to_cpu(sampler.text.encoders)


def batch_latents(batch: Batch, sampler: Sampler, eps: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w] of a batch, drawn with the standard normal eps from its posterior: the cached one, or
    its images' (on eps's device)."""
    if "latent_mean" in batch.cached:
        mean, std = (batch.cached[f"latent_{name}"].to(eps, non_blocking=True) for name in ("mean", "std"))
        return sampler.draw_latents(mean, std, eps)
    return sampler.encode(batch.images.to(eps.device, non_blocking=True), eps)
