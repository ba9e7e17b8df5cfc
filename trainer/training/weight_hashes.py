"""Hashes of weight files, remembered in the run folder: while rank 0 reads 60 GB to hash them, all other ranks wait."""

import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from models.pipeline import files_hash

FILE = "hashes.json"
SETTLED_NS = 2_000_000_000  # some file systems keep times in seconds: a younger file may change without another time


class WeightHashes:
    """Called with files: their sha256 (hexadecimal), one after the other. Files whose paths, sizes and modification times are
    those of an earlier call, also of an earlier process, are not read again.

    The file is an extra: if it cannot be read or written, hashes are computed.
    """

    def __init__(self, folder: Path):
        self.file = folder / FILE

    def __call__(self, files: Sequence[Path]) -> str:
        name, stamps = "\n".join(str(Path(file).resolve()) for file in files), _stamps(files)
        known = self._read().get(name)
        if isinstance(known, dict) and known.get("stamps") == stamps and known.get("sha256"):
            return known["sha256"]
        digest = files_hash(files)
        settled = time.time_ns() - max(changed for _, changed in stamps) > SETTLED_NS
        if settled and _stamps(files) == stamps:
            self._write(self._read() | {name: {"stamps": stamps, "sha256": digest}})
        return digest

    def _read(self) -> dict[str, dict]:
        try:
            found = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, known: dict[str, dict]) -> None:
        temporary = self.file.with_name(f"{FILE}.{uuid.uuid4().hex}")  # two jobs may share a run folder
        try:
            temporary.write_text(json.dumps(known, indent=1) + "\n")
            os.replace(temporary, self.file)
        except OSError:
            with suppress(OSError):
                temporary.unlink()


def _stamps(files: Sequence[Path]) -> list[list[int]]:
    """Size and time of the last modification of each file."""
    return [[(about := os.stat(file)).st_size, about.st_mtime_ns] for file in files]
