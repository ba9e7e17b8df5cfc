"""Verbs as child processes: started under a launcher, asked to save before they stop; none is left running."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

STOP_SECONDS = 120.0  # for the ranks to save and stop before they are killed
ASK_SECONDS = 15.0  # a training that is just ending misses the signal, and the next one in its process needs another
# For few cores: one thread per process that sleeps while it waits is several times faster than many that spin.
DEFAULTS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def command(verb: str, arguments: list[str], processes: int, launcher: str) -> list[str]:
    """The command line of a verb; with one process it needs no launcher."""
    python, module = [sys.executable, "-m"], f"trainer.{verb}"
    if processes == 1:
        return [*python, module, *arguments]
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        start = ["deepspeed.launcher.runner", "--quiet", "--num_gpus", str(processes), "--master_port", port]
    return [*python, *start, "--module", module, *arguments]


class Children:
    """The processes that have `folder` as DISBACK_JOB_FOLDER in their environment, whoever their parent is by now.

    A context manager. Entering it first stops processes that a killed call has left. If this process is killed, a second
    process, which also keeps the locks of this one, ends them. Finding processes needs Linux's /proc.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.mark = f"DISBACK_JOB_FOLDER={self.folder}".encode()

    def __enter__(self) -> Self:
        self.end()
        self.folder.mkdir(exist_ok=True)
        end, self.alive = os.pipe()
        self.guard = os.fork()
        if self.guard == 0:
            try:
                os.setsid()  # out of reach of signals to the process group
                os.close(self.alive)
                os.read(end, 1)  # until the other end is closed
                self.end()
            finally:
                os._exit(0)
        os.close(end)
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()
        os.close(self.alive)
        os.waitpid(self.guard, 0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, line: list[str], stdout: IO | int, stderr: IO) -> subprocess.Popen:
        """Starts a command in a session of its own, out of reach of Ctrl-C: the launchers kill their ranks on it."""
        (self.folder / "exit").unlink(missing_ok=True)
        env = DEFAULTS | os.environ | {"DISBACK_JOB_FOLDER": str(self.folder)}
        return subprocess.Popen(line, stdout=stdout, stderr=stderr, env=env, start_new_session=True)

    def outcome(self, code: int) -> tuple[int, str]:
        """Exit code and message of what the first rank to fail wrote, if it did; else the launcher's code, which says
        less: torchrun's is 1 for any failure."""
        try:
            own, _, message = (self.folder / "exit").read_text().partition(" ")
            return (int(own), message.strip()) if code else (0, "")
        except (OSError, ValueError):
            return code, ""

    def running(self) -> dict[int, bytes]:
        """Command lines by process ID."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if self.mark in (process / "environ").read_bytes().split(b"\0"):
                    found[int(process.name)] = (process / "cmdline").read_bytes()
        return found

    def end(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Asks the ranks to save and stop, and waits. In a hurry, or after STOP_SECONDS, kills all processes."""
        began, asked = time.monotonic(), float("-inf")
        while running := self.running():
            now, number = time.monotonic(), signal.SIGKILL
            ranks = [process for process, line in running.items() if b"\0-m\0trainer." in line]
            if not hurry() and now - began < STOP_SECONDS:
                number = signal.SIGTERM
                # Not the launchers, which would kill the ranks; unless they have not started any.
                running = (ranks or running) if now - asked > ASK_SECONDS else ()
                asked = now if running else asked
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            time.sleep(0.2)
