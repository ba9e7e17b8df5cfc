"""Small files of arrays next to shards, which several processes may write at once."""

import os
import uuid
from pathlib import Path

import numpy as np


def write_npz(file: Path, arrays: dict[str, np.ndarray]) -> bool:
    """Writes a .npz atomically; False if the folder is not writable (a read-only data set)."""
    # A process id would not be unique: ranks on several nodes may write into one shared folder.
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as handle:
            np.savez(handle, **arrays)
        os.replace(temporary, file)
    except OSError:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # not possible in this folder either
        return False
    return True
