"""An end with the launcher: a rank whose torchrun or deepspeed was killed stops at once.

Both start their ranks so that a SIGKILL to them does not reach the ranks, which would train on beside the restarted run, or
wait ten minutes for a rendezvous that is gone. A process without a launcher (nohup, a shell that ends) is left alone, and
Slurm itself ends what srun started.
"""

import os
import select
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from trainer.distributed.group import this_rank
from trainer.distributed.job import node_name, write_exit_status
from trainer.distributed.stop_flag import stop_requested

PROGRAMS = {"torchrun", "deepspeed", "accelerate", "accelerate-launch"}
MODULES = ("torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.", "accelerate.commands.")
FAILED = 1
ASKED_SECONDS = 2.0  # from the end of a launcher to the signal that it passes on
SAVE_SECONDS = 300.0  # for a stop on that signal; DeepSpeed's inner launcher gives the ranks less

_watching = False


def _parent(process: int) -> int:
    """0 if there is none, or it is not visible from here."""
    try:
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _program(words: list[str]) -> str:
    """What a command line runs: a program's name, or for Python that of its script or module."""
    name, rest = Path(words[0]).name, iter(words[1:])
    if not name.startswith("python"):
        return name
    for word in rest:
        if word == "-m":
            return next(rest, "")
        if word in ("-X", "-W"):
            next(rest, "")
        elif not word.startswith("-"):
            return Path(word).name
    return ""


def _launches(process: int) -> bool:
    try:
        program = _program(Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0"))
    except OSError:
        return False
    return program in PROGRAMS or program.startswith(MODULES)


def launcher_processes() -> list[int]:
    """This process's ancestors, nearest first, up to the outermost launcher; none without a launcher. DeepSpeed's `deepspeed`
    starts another process, which starts the ranks."""
    chain, process = [], os.getpid()
    while (process := _parent(process)) > 0:
        chain.append(process)
    last = max((place for place, process in enumerate(chain) if _launches(process)), default=-1)
    return chain[: last + 1]


def end_with_launcher() -> None:
    """Ends this process when its launcher ends before it. Needs Linux; elsewhere it does nothing."""
    global _watching
    if _watching or not hasattr(os, "pidfd_open"):
        return
    _watching, launchers, poll = True, launcher_processes(), select.poll()
    try:
        for process in launchers:
            poll.register(os.pidfd_open(process), select.POLLIN)
    except ProcessLookupError:  # gone meanwhile
        _end()
    except OSError:  # a kernel before 5.3
        return
    if launchers:
        threading.Thread(target=_watch, args=(poll,), daemon=True).start()


def _watch(launchers: select.poll) -> None:
    """DeepSpeed's outer process dies of the signal that asks all to stop, at once, while the ranks still save."""
    launchers.poll()
    asked, patience = stop_requested(), time.monotonic() + ASKED_SECONDS
    while not asked and time.monotonic() < patience:
        time.sleep(0.1)
        asked = stop_requested()
    if asked:
        time.sleep(SAVE_SECONDS)
    _end()


def _end() -> NoReturn:
    text = f"rank {this_rank()} on node {node_name()} ends, because the launcher that started it was killed"
    write_exit_status(FAILED, text)
    print(f"disback: {text}", file=sys.stderr, flush=True)
    os._exit(FAILED)
