"""What `data.train`, `data.heldout` and `data.labelled` name: shards or files of prompts."""

from collections.abc import Collection
from pathlib import Path

from data.encoded import encoding_of_shards
from data.errors import DataError
from data.prompt_dataset import PromptDataset
from data.prompts import READERS
from data.settings import DataSettings
from data.shard_dataset import ShardDataset
from data.shard_patterns import expand, expand_braces, not_read

PROMPTS = tuple(suffix for suffix in READERS if suffix != ".pkl")  # of files that are prompts alone


def open_dataset(data: DataSettings, split: str, want: Collection[str], seed: int) -> ShardDataset | PromptDataset:
    """The samples of `data.train`, `data.heldout` or `data.labelled` (the `split`). want: as in ShardDataset. Raises
    DataError."""
    setting, named = f"data.{split}", getattr(data, split)
    if names_prompts(named, setting):
        return PromptDataset(expand(named, setting), want, seed, data.caption_field)
    dataset = ShardDataset(expand(named, setting), data.resolution, want, seed, **data.keys)
    dataset.rejected += not_read(named, setting)
    return dataset


def names_prompts(named: str | list[str], setting: str) -> bool:
    """Whether these are files of prompts alone. Raises DataError if only some are."""
    entries = expand_braces(named, setting)
    prompts = [entry for entry in entries if Path(entry).suffix.lower() in PROMPTS]
    if prompts and len(prompts) < len(entries):
        raise DataError(
            f"{setting} mixes prompts alone ({prompts[0]}) with shards: name files of prompts, or shards, not both"
        )
    return bool(prompts)


def encoding_of_training(data: DataSettings) -> dict | None:
    """How the samples of `data.train` are encoded, from the first one; None for plain images and for prompts alone. Raises
    DataError."""
    if names_prompts(data.train, "data.train"):
        return None
    return encoding_of_shards(expand(data.train, "data.train"))
