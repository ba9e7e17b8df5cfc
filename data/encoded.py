"""Samples that are encoded already: latents and text states instead of an image, and a record of what made them.

Such a sample is `{key}.safetensors`, its caption, and its json with a record under "cache": what made it (the same for
all samples of a set), original_size (h, w) and crop (top, left) in pixels.
"""

import json

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from data.errors import DataError
from data.shard_index import ShardIndex

MEMBER, RECORD = "safetensors", "cache"
# What a stage may want of a cached sample; latents are the posterior's mean and deviation, unscaled [C, h, w]. Text has
# states [L, D] and, in families that have it, pooled text [P].
TENSORS = {"latents": ("latent_mean", "latent_std"), "text": ("states", "pooled")}
MADE_BY = ("resolution", "vae", "text", "precision")


def pack(tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a sample's tensors. Each is copied: a row of a batch would else carry the batch's memory along."""
    return safetensors.torch.save(
        {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    )


def unpack(raw: bytes, want: frozenset[str]) -> dict[str, Tensor]:
    """The wanted tensors of a sample, by name. Raises ValueError if they are damaged or not all there."""
    try:
        tensors = safetensors.torch.load(raw)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    found = {name: tensors[name] for what in TENSORS if what in want for name in TENSORS[what] if name in tensors}
    if any(TENSORS[what][0] not in found for what in TENSORS if what in want):
        raise ValueError("a tensor is missing")
    return found


def made_by(index: ShardIndex) -> dict | None:
    """What made a shard's cached samples, by its first one; None if the shard holds no cache. Raises DataError."""
    if MEMBER not in index.extensions or "json" not in index.extensions:
        return None
    offsets, sizes = index.member(["json"])
    try:
        with index.tar.open("rb") as tar:
            tar.seek(max(int(offsets[0]), 0))
            record = json.loads(tar.read(max(int(sizes[0]), 0)) or b"{}").get(RECORD)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"shard {index.tar}: its first json cannot be read ({error}): build the shard again") from error
    return {key: record.get(key) for key in MADE_BY} if isinstance(record, dict) else None


def check_same(first: ShardIndex, first_record: dict | None, other: ShardIndex) -> None:
    """Raises DataError unless two shards of a set are both plain, or both caches that the same parts made."""
    record = made_by(other)
    if record == first_record:
        return
    if record is None or first_record is None:
        cached, plain = (other, first) if record else (first, other)
        what = f"{cached.tar} is encoded and {plain.tar} is not"
    else:
        what = f"{first.tar} and {other.tar} differ in " + ", ".join(
            f"{key} ({_short(first_record[key])}, {_short(record[key])})"
            for key in MADE_BY
            if first_record[key] != record[key]
        )
    raise DataError(f"shards are mixed: {what}: name shards of one kind in data.train")


def _short(value: object) -> str:
    return f"{value}"[:12]
