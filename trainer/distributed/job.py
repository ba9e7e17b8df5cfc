"""What a process tells the job script that started it, in the folder that DISBACK_JOB_FOLDER names (slurm/common.sh)."""

import os
import socket
from pathlib import Path


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def leave_word(code: int, message: str) -> None:
    """Tells the job script how this process ended; the first to end is heard, since the others may only follow it.
    (srun reports the highest code of all, which is that of the ranks it killed, and torchrun always 1.)"""
    folder = os.environ.get("DISBACK_JOB_FOLDER")
    if not folder or not code:
        return
    try:
        file = os.open(Path(folder) / "exit", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except OSError:
        return  # another rank was first, or the folder is not writable from here: the launcher's own code stands
    with os.fdopen(file, "w") as stream:
        stream.write(f"{code} {message}\n")


def report_nodes(nodes: list[str]) -> None:
    """Writes down the nodes that failed the check: the job script leaves them out after the second time."""
    if folder := os.environ.get("DISBACK_JOB_FOLDER"):
        with (Path(folder) / "bad-nodes").open("a") as stream:
            stream.writelines(f"{node}\n" for node in nodes)
