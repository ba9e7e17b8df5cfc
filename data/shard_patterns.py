"""Expands folders, globs and brace patterns to shard files."""

import glob
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import braceexpand

from data.errors import DataError

ADVICE = "check the path, or build shards with `disback shards`"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def expand(patterns: str | list[str], setting: str = "shards") -> list[Path]:
    """The sorted, distinct shard files of folders (their *.tar, without hidden ones), globs and brace patterns.

    setting: the configuration key of the patterns, for error messages. Raises DataError for a missing shard, a
    malformed pattern, or one without a match.
    """
    found: set[Path] = set()
    for path in _paths(patterns, setting):
        found.update(_files(path, setting))
    if not found:
        raise DataError(f"{setting} names no shards: give a folder, a glob or a brace pattern; {ADVICE}")
    return sorted(found)


def not_read(patterns: str | list[str], setting: str = "shards") -> Counter[str]:
    """What looks like a shard in the folders that `patterns` names, but is none: hidden files (macOS writes a ._x.tar to
    some file systems) and compressed tars, by what they are. Raises DataError for a malformed pattern."""
    found: Counter[str] = Counter()
    for folder in {path for path in _paths(patterns, setting) if path.is_dir()}:
        for name in (file.name.lower() for file in folder.iterdir()):
            found["hidden .tar file"] += name.startswith(".") and name.endswith(".tar")
            found["compressed tar"] += name.endswith(COMPRESSED)
    return +found


def _paths(patterns: str | list[str], setting: str) -> Iterator[Path]:
    return map(Path, expand_braces(patterns, setting))


def expand_braces(patterns: str | list[str], setting: str) -> list[str]:
    """The patterns without their braces, in their order; empty ones are left out. Raises DataError if braces are
    unbalanced."""
    return [text for pattern in entries_of(patterns) for text in _braces(pattern, setting)]


def entries_of(patterns: str | list[str]) -> list[str]:
    """One pattern or several as a list, without empty ones."""
    return [pattern for pattern in ([patterns] if isinstance(patterns, str) else patterns) if pattern]


def _braces(pattern: str, setting: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"{setting}: pattern {pattern!r} has unbalanced braces: write it as a-{{000..011}}.tar"
        ) from error


def _files(path: Path, setting: str) -> list[Path]:
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() == ".tar" and not file.name.startswith(".")]
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
