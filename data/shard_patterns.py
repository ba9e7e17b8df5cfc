"""Expands folders, globs and brace patterns to shard files."""

import glob
from pathlib import Path

import braceexpand

from data.errors import DataError

ADVICE = "check the path, or build shards with `disback shards`"


def expand(patterns: str | list[str], setting: str = "shards") -> list[Path]:
    """The sorted, distinct shard files of folders (their *.tar), globs and brace patterns.

    setting: the configuration key of the patterns, for error messages. Raises DataError for a missing shard, a
    malformed pattern, or one without a match.
    """
    found: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for text in _braces(pattern, setting) if pattern else []:
            found.update(_files(Path(text).expanduser(), setting))
    if not found:
        raise DataError(f"{setting} names no shards: give a folder, a glob or a brace pattern; {ADVICE}")
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
        problem = f"no *.tar in folder {path}"
    elif path.is_file():
        return [path]
    elif glob.has_magic(str(path)):
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]
        problem = f"no file matches {path}"
    else:
        files = []
        problem = f"shard {path} does not exist"
    if not files:
        raise DataError(f"{setting}: {problem}: {ADVICE}")
    return files
