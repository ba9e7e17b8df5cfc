"""From what a user writes to a list of shard files."""

import glob
from pathlib import Path

import braceexpand

from data.errors import DataError


def expand(patterns: str | list[str], setting: str) -> list[Path]:
    """Shard files of folders, globs and brace patterns, in a fixed order, each once.

    setting: the key that the patterns come from, for messages. Raises DataError for a missing shard or an empty match.
    """
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not pattern:
            continue
        for text in braceexpand.braceexpand(pattern):
            path = Path(text)
            if path.is_dir():
                files = sorted(path.glob("*.tar"))
            elif any(c in text for c in "*?["):
                files = [Path(name) for name in sorted(glob.glob(text))]
            else:
                files = [path] if path.is_file() else []
            if not files:
                raise DataError(f"{setting}: no shard at {text}: check the path, or build shards with `disback shards`")
            found += files
    if not found:
        raise DataError(f"{setting} is empty: name WebDataset shards, a folder, a glob or a brace pattern")
    return list(dict.fromkeys(found))
