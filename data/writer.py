"""Samples to shards."""

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import webdataset

from data.errors import DataError
from data.index import build_index, save_index


def write_shards(samples: Iterable[dict], out: Path, prefix: str, per_shard: int) -> list[Path]:
    """Writes samples ({"__key__": name, "png": bytes, "txt": text, "json": object, ...}) as prefix-000000.tar and on,
    `per_shard` a shard, each with its index. A shard has its final name only when it is whole.

    Raises DataError if the folder cannot be written or already holds shards of this prefix.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        existing = sorted(out.glob(f"{prefix}-*.tar"))
        if existing:
            raise DataError(f"{out} already holds {existing[0].name}: choose another folder or remove its shards first")
        shards, stream = [], iter(samples)
        while chunk := list(islice(stream, per_shard)):
            final = out / f"{prefix}-{len(shards):06d}.tar"
            temporary = final.with_suffix(".tar.tmp")
            # Fixed times: the same samples give the same bytes.
            with webdataset.TarWriter(str(temporary), mtime=0, user="", group="") as writer:
                for sample in chunk:
                    writer.write(sample)
            os.replace(temporary, final)
            save_index(build_index(final))
            shards.append(final)
    except OSError as error:
        raise DataError(f"shards cannot be written into {out}: {error.strerror}: choose another folder") from error
    return shards
