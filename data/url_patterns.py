"""Shards at URLs: which entries are URLs, and what their patterns stand for."""

import fnmatch
import os
import re
from urllib.parse import urlsplit

from data.errors import DataError
from data.remote_files import s3_client

URL = re.compile(r"pipe:|[a-z][a-z0-9+.-]*://")


def is_url(entry: str) -> bool:
    """Whether an entry of data.train is a URL (or a command, pipe:) and not a path."""
    return bool(URL.match(entry))


def expand_url(url: str, setting: str) -> list[str]:
    """The shards that a URL without braces names: itself, or at s3:// and hf:// those that match its `*`, or the *.tar of a
    folder (a URL that ends with a slash). Raises DataError if there are none, or if they cannot be listed."""
    scheme = url.partition(":")[0]
    if scheme == "pipe" or not ("*" in url or url.endswith("/")):
        return [url]
    if scheme not in ("s3", "hf"):
        raise DataError(
            f"{setting}: {url}: {scheme}:// cannot be listed: name its shards with braces, {{000000..000099}}.tar"
        )
    pattern = url + "*.tar" if url.endswith("/") else url
    try:
        found = _list_s3(pattern) if scheme == "s3" else _list_hf(pattern)
    except DataError:
        raise
    except Exception as error:  # of the libraries
        raise DataError(
            f"{setting}: {url} cannot be listed ({' '.join(str(error).split())[:300]}): check it"
        ) from error
    if not found:
        raise DataError(f"{setting}: no shard matches {pattern}: check the address")
    return found


def _list_s3(pattern: str) -> list[str]:
    place = urlsplit(pattern, allow_fragments=False)
    key = place.path.lstrip("/")
    pages = s3_client(os.getpid()).get_paginator("list_objects_v2")
    found = []
    for page in pages.paginate(Bucket=place.netloc, Prefix=key.partition("*")[0]):
        names = [entry["Key"] for entry in page.get("Contents", ())]
        # A * does not match a slash, as in paths.
        names = [name for name in names if name.count("/") == key.count("/") and fnmatch.fnmatchcase(name, key)]
        found += [f"s3://{place.netloc}/{name}" for name in names]
    return sorted(found)


def _list_hf(pattern: str) -> list[str]:
    from huggingface_hub import HfFileSystem

    return sorted(f"hf://{name}" for name in HfFileSystem().glob(pattern))
