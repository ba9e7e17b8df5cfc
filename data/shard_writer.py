"""Writes samples as shards."""

import os
import re
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

import webdataset

from data.errors import DataError
from data.shard_index import build_index, index_file, load_index, save_index


def write_shards(
    samples: Iterable[dict], out: Path, prefix: str, per_shard: int = 1000, overwrite: bool = False
) -> list[Path]:
    """Writes samples ({"__key__": name, "png": bytes, "txt": text, "json": object, ...}) as out/prefix-000000.tar and
    so on, `per_shard` samples each, each with its index. A shard gets its final name once it is complete, and the same
    samples give the same bytes. Samples are streamed, not collected in memory.

    overwrite: replace all shards of this prefix. Raises DataError if the folder is not writable, or has shards of this
    prefix.
    """
    existing = open_folder(out, prefix)
    if existing and not overwrite:
        raise DataError(
            f"{out} already holds {existing[0].name} ({len(existing)} shards of this prefix): "
            "choose another folder or prefix, or remove them first"
        )
    shards: list[Path] = []
    stream = iter(samples)
    for first in stream:
        final = shard_file(out, prefix, len(shards))
        write_shard(chain([first], islice(stream, per_shard - 1)), final)
        shards.append(final)
    for stale in set(existing) - set(shards):
        stale.unlink()
        index_file(stale).unlink(missing_ok=True)
    return shards


def open_folder(out: Path, prefix: str) -> list[Path]:
    """Creates a folder for shards; returns those of this prefix that it has. Raises DataError if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return list_shards(out, prefix)
    except OSError as error:
        raise _unwritable(out, error) from error


def shard_file(out: Path, prefix: str, number: int) -> Path:
    return out / f"{prefix}-{number:06d}.tar"


def ensure_shards(keys: list[str], samples: Iterable[dict], out: Path, prefix: str, per_shard: int) -> None:
    """Writes samples with these keys as `write_shards` does, unless their shards exist; an interrupted build starts over.
    `samples` is only iterated if needed. Raises DataError if the folder has other shards of this prefix."""
    existing = [key.decode() for shard in list_shards(out, prefix) for key in load_index(shard).keys]
    if existing == keys:
        return
    if existing != keys[: len(existing)]:
        raise DataError(
            f"{out} has other {prefix}-*.tar (made with another seed or version, or of something else): choose another "
            "folder, or remove them"
        )
    write_shards(samples, out, prefix, per_shard, overwrite=True)


def list_shards(out: Path, prefix: str) -> list[Path]:
    """The shards of this prefix that write_shards wrote into a folder, sorted; none if the folder does not exist."""
    name = re.compile(re.escape(prefix) + r"-\d{6}\.tar")
    return sorted(file for file in out.iterdir() if name.fullmatch(file.name)) if out.is_dir() else []


def write_shard(samples: Iterable[dict], final: Path) -> None:
    """Writes one shard and its index. The shard gets its final name once it is complete. Raises DataError if writing
    fails."""
    temporary = final.with_name(final.name + ".tmp")
    try:
        handle = temporary.open("wb")
    except OSError as error:
        raise _unwritable(final.parent, error) from error
    try:
        with handle, webdataset.TarWriter(handle, mtime=0, user="", group="") as writer:
            for sample in samples:
                try:
                    writer.write(sample)
                except OSError as error:
                    raise _unwritable(final.parent, error) from error
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)  # exists only after an error
    save_index(build_index(final))


def _unwritable(out: Path, error: OSError) -> DataError:
    return DataError(f"cannot write shards into {out}: {error.strerror}: choose a writable folder with enough space")
