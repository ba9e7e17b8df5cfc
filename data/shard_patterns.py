"""From what a user writes to a list of shard files."""

import glob
from pathlib import Path

import braceexpand

from data.errors import DataError

CURE = "check the path, or build shards with `disback shards`"


def expand(patterns: str | list[str], setting: str = "shards") -> list[Path]:
    """Sorted shard files of folders (their *.tar), globs and brace patterns, each once.

    setting: the configuration key that the patterns come from, for messages. Raises DataError for a missing shard, an
    empty match and a malformed pattern.
    """
    found: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for text in _braces(pattern, setting) if pattern else []:
            found.update(_files(Path(text).expanduser(), setting))
    if not found:
        raise DataError(f"{setting}: no shards are named: give a folder, a glob or a brace pattern; {CURE}")
    return sorted(found)


def _braces(pattern: str, setting: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"{setting}: pattern {pattern!r} has unbalanced braces: write it as a-{{000..011}}.tar"
        ) from error


def _files(path: Path, setting: str) -> list[Path]:
    if path.is_dir():
        files = list(path.glob("*.tar"))
        problem = f"folder {path} holds no *.tar"
    elif path.is_file():
        return [path]
    elif glob.has_magic(str(path)):
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]
        problem = f"nothing matches {path}"
    else:
        files = []
        problem = f"shard {path} does not exist"
    if not files:
        raise DataError(f"{setting}: {problem}: {CURE}")
    return files
