"""Samples to shards."""

import os
import re
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

import webdataset

from data.errors import DataError
from data.shard_index import build_index, index_file, save_index


def write_shards(
    samples: Iterable[dict], out: Path, prefix: str, per_shard: int = 1000, overwrite: bool = False
) -> list[Path]:
    """Writes samples ({"__key__": name, "png": bytes, "txt": text, "json": object, ...}) as out/prefix-000000.tar and
    on, `per_shard` samples each, with an index beside each. A shard gets its name only when it is whole, and the same
    samples give the same bytes. Samples are consumed one by one and not kept.

    overwrite: replace this prefix's shards, all of them. Raises DataError if the folder cannot be written or already
    holds shards of this prefix.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        existing = shards_of(out, prefix)
    except OSError as error:
        raise _unwritable(out, error) from error
    if existing and not overwrite:
        raise DataError(
            f"{out} already holds {existing[0].name} ({len(existing)} shards of this prefix): "
            "choose another folder or prefix, or remove them first"
        )
    shards: list[Path] = []
    stream = iter(samples)
    for first in stream:
        final = out / f"{prefix}-{len(shards):06d}.tar"
        write_shard(chain([first], islice(stream, per_shard - 1)), final)
        shards.append(final)
    for stale in set(existing) - set(shards):
        stale.unlink()
        index_file(stale).unlink(missing_ok=True)
    return shards


def shards_of(out: Path, prefix: str) -> list[Path]:
    """The shards that write_shards made in a folder under this prefix, sorted; none if there is no such folder."""
    name = re.compile(re.escape(prefix) + r"-\d{6}\.tar")
    return sorted(file for file in out.iterdir() if name.fullmatch(file.name)) if out.is_dir() else []


def write_shard(samples: Iterable[dict], final: Path) -> None:
    """One shard and its index; the shard gets its name only when it is whole. Raises DataError if it cannot be
    written."""
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
        temporary.unlink(missing_ok=True)  # there only if something went wrong
    save_index(build_index(final))


def _unwritable(out: Path, error: OSError) -> DataError:
    return DataError(
        f"shards cannot be written into {out}: {error.strerror}: choose a folder with room that you may write"
    )
