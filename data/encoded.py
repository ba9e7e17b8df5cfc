"""Encoded samples: latents and text states instead of an image, with a record of how they were made.

Such a sample is `{key}.safetensors`, its caption, and its json with the record under "cache": how the set was made (the
same for all its samples), and this sample's original_size (h, w) and crop (top, left) in pixels, and its captions if it
has several.
"""

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from data.errors import DataError
from data.shard_index import ShardIndex, first_json, load_index

EXTENSION, RECORD_KEY = "safetensors", "cache"
# Tensors by what a stage requests. Latents are the VAE posterior's mean and standard deviation, unscaled, [C, h, w].
# Text is states [L, D] and, in families that have it, pooled text [P].
TENSORS = {"latents": ("latent_mean", "latent_std"), "text": ("states", "pooled")}
ENCODING_KEYS = ("resolution", "vae", "text", "precision", "captions")  # captions: where from, if not from .txt
SELECTION_KEYS = ("buckets", "filters", "min_size")  # of `data`, in the record if they are set
CAPTIONS_KEY = "all_captions"  # in the record, by source, of a sample with several: text tensors are then STATES/SOURCE


def pack_tensors(tensors: dict[str, Tensor]) -> bytes:
    """A sample's tensors as safetensors bytes. Copied, since a row of a batch keeps the whole batch in memory."""
    return safetensors.torch.save(
        {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    )


def unpack_tensors(raw: bytes, want: frozenset[str], source: str | None = None) -> dict[str, Tensor]:
    """A sample's requested tensors by name. source: of the caption, where the sample has several. Raises ValueError if the bytes are damaged or a tensor is missing."""
    try:
        tensors = safetensors.torch.load(raw)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if source is not None:
        tensors |= {name: tensors[f"{name}/{source}"] for name in TENSORS["text"] if f"{name}/{source}" in tensors}
    found = {name: tensors[name] for what in TENSORS if what in want for name in TENSORS[what] if name in tensors}
    if any(TENSORS[what][0] not in found for what in TENSORS if what in want):
        raise ValueError("a tensor is missing")
    return found


def encoding_of(index: ShardIndex) -> dict | None:
    """How a shard's samples were encoded, from its first sample; None for a shard of plain images. Raises DataError."""
    if EXTENSION not in index.extensions or "json" not in index.extensions:
        return None
    try:
        record = first_json(index).get(RECORD_KEY)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"shard {index.tar}: cannot read its first json ({error}): build the shard again") from error
    return encoding_in(record)


def encoding_in(record: object) -> dict | None:
    """How a sample was encoded, from the record in its .json; None if that is none."""
    if not isinstance(record, dict):
        return None
    return {key: record.get(key) for key in ENCODING_KEYS} | {
        key: record[key] for key in SELECTION_KEYS if key in record
    }


def encoding_of_shards(paths: Sequence[Path]) -> dict | None:
    """How the first shard that is not empty was encoded; None for plain images. Raises DataError."""
    return next((encoding_of(index) for index in map(load_index, paths) if len(index)), None)


def check_same_encoding(first: ShardIndex, first_encoding: dict | None, other: ShardIndex) -> None:
    """Raises DataError unless two shards are both plain, or both encoded in the same way."""
    encoding = encoding_of(other)
    if encoding == first_encoding:
        return
    if encoding is None or first_encoding is None:
        encoded, plain = (other, first) if encoding else (first, other)
        what = f"{encoded.tar} is encoded and {plain.tar} is not"
    else:
        what = f"{first.tar} and {other.tar} differ in " + ", ".join(
            f"{key} ({_short(first_encoding.get(key))}, {_short(encoding.get(key))})"
            for key in ENCODING_KEYS + SELECTION_KEYS
            if first_encoding.get(key) != encoding.get(key)
        )
    raise DataError(f"data.train mixes different kinds of shards: {what}: name shards of one kind only")


def _short(value: object) -> str:
    return f"{value}"[:12]
