"""Files for the Slurm script that started this process, in the folder DISBACK_JOB_FOLDER (see slurm/common.sh)."""

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def write_exit_status(code: int, message: str) -> None:
    """Writes `exit`: how this process failed. Only the first process to fail writes it, since the others may just follow.
    (The launchers' own codes say less: srun reports the highest of all, that of the ranks it killed, and torchrun always 1.)
    """
    folder = os.environ.get("DISBACK_JOB_FOLDER")
    if not folder or not code:
        return
    try:
        file = os.open(Path(folder) / "exit", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except OSError:
        return  # another rank was first, or the folder is not writable from here: the launcher's code has to do
    with os.fdopen(file, "w") as stream:
        stream.write(f"{code} {message}\n")


def report_bad_nodes(nodes: Iterable[str]) -> None:
    """Appends nodes that failed the check at the start to `bad-nodes`. The job script excludes a node after its second
    failure."""
    if folder := os.environ.get("DISBACK_JOB_FOLDER"):
        # The folder may be on the first node's own disk: an encoding job has it where it was submitted.
        with contextlib.suppress(OSError), (Path(folder) / "bad-nodes").open("a") as stream:
            stream.writelines(f"{node}\n" for node in nodes)
