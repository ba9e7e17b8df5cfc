"""What `data.train`, `data.heldout` and `data.labelled` name: local shards, shards at URLs, or files of prompts."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from data.encoded import encoding_of_shards
from data.errors import DataError
from data.loader import Batches
from data.mixture import MixedDataset
from data.prompt_dataset import PromptDataset
from data.prompts import READERS
from data.settings import DataSettings
from data.shard_cache import copy_shards
from data.shard_dataset import ShardDataset
from data.shard_patterns import entries_of, expand, expand_braces, not_read
from data.streams import StreamBatches, StreamDataset, first_encoding
from data.url_patterns import expand_url, is_url

PROMPTS = tuple(suffix for suffix in READERS if suffix != ".pkl")  # of files that are prompts alone
Source = ShardDataset | PromptDataset | MixedDataset | StreamDataset


def open_dataset(
    data: DataSettings,
    split: str,
    want: Collection[str],
    seed: int,
    batch: int = 1,
    say: Callable[[str], None] = print,
) -> Source:
    """The samples of `data.train`, `data.heldout` or `data.labelled` (the `split`). want, batch: as in ShardDataset. say: is
    told the progress of copying. Raises DataError."""
    setting = f"data.{split}"
    entries = entries_of(getattr(data, split))
    weights = data.weights if split == "train" else []
    if weights and (len(weights) != len(entries) or min(weights) <= 0):
        raise DataError(
            f"data.weights has {len(weights)} weights for the {len(entries)} entries of data.train: give each entry one, greater "
            "than 0"
        )
    if any(map(is_url, entries)) and not data.cache_dir:
        if split != "train":
            raise DataError(
                f"{setting}: {entries[0]} is read at random, which a stream cannot: set data.cache_dir, or copy it"
            )
        _refuse_selection(
            data, f"{setting}: {entries[0]} is a stream, whose samples are not known before they are read"
        )
        return StreamDataset([_urls(entry, setting) for entry in entries], want, seed, data)
    if weights and data.buckets:
        raise DataError("data.weights and data.buckets do not go together: leave one of them out")
    groups = [[entry] for entry in entries] if weights else [entries]
    datasets = [_local(group, setting, data, want, seed, batch, say) for group in groups]
    return MixedDataset(datasets, weights, seed) if weights else datasets[0]


def _local(
    entries: list[str],
    setting: str,
    data: DataSettings,
    want: Collection[str],
    seed: int,
    batch: int,
    say: Callable[[str], None],
) -> ShardDataset | PromptDataset:
    if names_prompts(entries, setting):
        _refuse_selection(data, f"{setting}: {entries[0]} holds prompts alone, which have no images to select by")
        return PromptDataset(expand(entries, setting), want, seed, prompt_field(data), data.size)
    keys = data.keys
    if setting == "data.train":
        keys |= {"selection": replace(data.selection, random_crop=data.crop == "random", flip=data.flip)}
    dataset = ShardDataset(_on_disk(entries, setting, data, say), data.resolution, want, seed, **keys, batch=batch)
    dataset.rejected += not_read([entry for entry in entries if not is_url(entry)], setting)
    return dataset


def _on_disk(entries: list[str], setting: str, data: DataSettings, say: Callable[[str], None]) -> list[Path]:
    """The shards of paths, then the local copies of those at URLs, which are made where they are missing."""
    paths = [entry for entry in entries if not is_url(entry)]
    urls = [url for entry in entries if is_url(entry) for url in _urls(entry, setting)]
    shards = expand(paths, setting) if paths or not entries else []
    return shards + (copy_shards(urls, Path(data.cache_dir), data.cache_gb, data.retry_seconds, say) if urls else [])


def prompt_field(data: DataSettings) -> str:
    """The field or column of prompts. Raises DataError for several."""
    if isinstance(data.caption_field, dict):
        raise DataError(
            "data.caption_field names several captions, but a file of prompts has one: name its field or column"
        )
    return data.caption_field


def _refuse_selection(data: DataSettings, why: str) -> None:
    chosen = [name for name in ("buckets", "filters", "min_size") if getattr(data, name)]
    if chosen:
        raise DataError(f"{why}: leave out data.{', data.'.join(chosen)}, or copy the shards first (data.cache_dir)")


def _urls(entry: str, setting: str) -> list[str]:
    """The URLs of an entry; of a path, the absolute paths, which cannot be taken for URLs."""
    if not is_url(entry):
        return [str(path.absolute()) for path in expand(entry, setting)]
    return [url for text in expand_braces(entry, setting) for url in expand_url(text, setting)]


def open_batches(dataset: Source, *place: object) -> Batches:
    """One rank's micro-batches of a dataset; the other arguments are those of Batches."""
    return StreamBatches(dataset, *place) if isinstance(dataset, StreamDataset) else Batches(dataset, *place)


def names_prompts(named: str | list[str], setting: str) -> bool:
    """Whether these are files of prompts alone. Raises DataError if only some are, or if they are not on a disk."""
    entries = expand_braces(named, setting)
    prompts = [entry for entry in entries if Path(entry).suffix.lower() in PROMPTS and not entry.startswith("pipe:")]
    if remote := [entry for entry in prompts if is_url(entry)]:
        raise DataError(f"{setting}: {remote[0]}: prompts are read from a disk: copy the file, and name the copy")
    if prompts and len(prompts) < len(entries):
        raise DataError(
            f"{setting} mixes prompts alone ({prompts[0]}) with shards: name files of prompts, or shards, not both"
        )
    return bool(prompts)


def encoding_of_training(data: DataSettings, say: Callable[[str], None] = print) -> dict | None:
    """How the samples of `data.train` are encoded, from the first one; None for plain images and for prompts alone. Raises
    DataError."""
    setting, entries = "data.train", entries_of(data.train)
    if names_prompts(entries, setting):
        return None
    if any(map(is_url, entries)) and not data.cache_dir:
        return first_encoding([_urls(entry, setting) for entry in entries], data)
    return encoding_of_shards(_on_disk(entries, setting, data, say))
