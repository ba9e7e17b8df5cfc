"""A lock on a folder that jobs on several nodes share, and that ends with the process that holds it.

The file holds a record of its owner, and the kernel's lock (flock), which dies with the process. Where that does not reach (a
file system without locks, or with locks within each node only; NFS after the death of a node), the owner's sign of life
decides: it touches the file every few seconds. Ages are differences of the file server's own times.
"""

import contextlib
import fcntl
import getpass
import json
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from trainer.distributed.job import node_name, write_exit_status
from trainer.errors import UserError

LOCK = ".lock"  # the file, in the folder that it guards
BEAT_SECONDS = 10.0  # between two signs of life
SILENT_SECONDS = 60.0  # without one, an owner on another node is dead, unless the kernel's lock says otherwise
STUCK_SECONDS = 300.0  # then even if it is still locked: NFSv3 keeps the locks of a dead node
PATIENCE_SECONDS = 900.0  # for the processes of a dead owner to end
POLL_SECONDS = 0.5
FAILED = 1


def _start_of(process: int) -> str:
    """When a process started, in ticks since boot; "" if there is none, or it is dead and nobody has waited for it."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        return ""


def _processes_seen() -> str:
    """Identifies the processes that are visible from here: the same node since the same boot, the same container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return node_name()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in some containers
        return str(os.getuid())


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    process: int = field(default_factory=os.getpid)
    start: str = field(default_factory=lambda: _start_of(os.getpid()))
    seen: str = field(default_factory=lambda: _processes_seen())
    user: str = field(default_factory=_user)
    node: str = field(default_factory=node_name)
    job: str = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID", ""))
    restarts: str = field(default_factory=lambda: os.environ.get("SLURM_RESTART_COUNT", "0"))
    since: str = field(default_factory=lambda: time.strftime("%F %T"))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def read(cls, file: IO[str]) -> "Owner | None":
        """None if the lock was given back, or its file is just being written."""
        file.seek(0)
        try:
            return cls(**json.loads(file.read()))
        except (ValueError, TypeError):
            return None

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.process} of {self.user} on node {self.node}{job}, since {self.since}"

    @property
    def local(self) -> bool:
        return self.seen == _processes_seen()

    @property
    def lives(self) -> bool:
        """Of a local owner. Its number may belong to another process by now."""
        return bool(self.start) and _start_of(self.process) == self.start


class Lock:
    """A lock file. `attempt` takes it if that is possible, `release` gives it back; it also ends with the process."""

    def __init__(self, file: Path):
        self.path = file
        self.holder: Owner | None = None  # after a vain attempt; None if unknown
        self.running = False  # after a vain attempt: whether the holder lives, as far as is known
        self._owner = Owner()
        self._file: IO[str] | None = None
        self._ended = threading.Event()
        self._silence: tuple[str, float] | None = None  # of which owner, and its last sign of life at the first attempt

    def attempt(self) -> bool:
        """Takes the lock, or says in `holder` and `running` why not. Raises UserError if the file cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+")
            if self._may_have(file) and self._write(file):
                self._file = file
                threading.Thread(target=self._beat, daemon=True).start()
                return True
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        file.close()
        return False

    def _may_have(self, file: IO[str]) -> bool:
        locked = _flock(file)
        owner = self.holder = Owner.read(file)
        if owner is None:
            self.running = locked is False
            return locked is not False
        if owner.local:
            self.running = owner.lives
            return not self.running and locked is not False
        beat = os.fstat(file.fileno()).st_mtime
        silent = self._now() - beat
        if self._silence is None or self._silence[0] != owner.token:
            self._silence = owner.token, beat
        # An earlier start of this Slurm job is about to end: it is waited for.
        earlier = owner.job != "" and owner.job == self._owner.job and owner.restarts != self._owner.restarts
        quiet = silent > 3 * BEAT_SECONDS  # its node may be dead, and its lock still there: it is waited for
        self.running = not earlier and (beat > self._silence[1] or (locked is False and not quiet))
        if locked is False and silent >= STUCK_SECONDS:
            self.path.unlink()  # the next attempt has a new file, which nobody has locked
            return False
        return locked is not False and silent >= SILENT_SECONDS

    def _now(self) -> float:
        """The time of the file server."""
        probe = self.path.with_name(f"{self.path.name}.{self._owner.token}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _write(self, file: IO[str]) -> bool:
        """Writes the record; False if another job did so at the same time, where the file system has no locks."""
        file.truncate(0)
        file.write(json.dumps(asdict(self._owner)))
        file.flush()
        os.fsync(file.fileno())
        if _flock(file) is None:
            time.sleep(1.0 + random.random())  # two that spoilt each other's record do not do so again
        return self._is_mine()

    def _is_mine(self) -> bool:
        with self.path.open() as file:
            owner = Owner.read(file)
        return owner is not None and owner.token == self._owner.token

    def _taken_over(self) -> bool:
        """An unreadable record is none of another job."""
        with self.path.open() as file:
            owner = Owner.read(file)
        return owner is not None and owner.token != self._owner.token

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the file system may be away for a moment
                if self._taken_over() and not self._ended.is_set():
                    self._end()
                os.utime(self.path)

    def _end(self) -> None:
        """This process was taken for dead: another one writes here now."""
        with self.path.open() as file:
            text = f"ends, because it was silent for long and {self.path} was taken over by {Owner.read(file)}"
        write_exit_status(FAILED, text)
        print(f"disback: process {os.getpid()} {text}", file=sys.stderr, flush=True)
        os._exit(FAILED)

    def release(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            if self._is_mine():
                self._file.truncate(0)
            fcntl.flock(self._file, fcntl.LOCK_UN)  # loader processes inherited the file, and may live on for a moment
        self._file.close()


def _flock(file: IO[str]) -> bool | None:
    """Whether the kernel's lock was free and is taken now; None on a file system that has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def locked(file: Path, what: str, remedy: str = "wait for it, or stop it") -> Iterator[None]:
    """Holds a lock file. Waits while its owner is dead but has left processes that still end, or may be dead; raises
    UserError if it lives."""
    lock, began, told = Lock(file), time.monotonic(), False
    while not lock.attempt():
        who = f" ({lock.holder})" if lock.holder else ""
        if lock.running and lock.holder:
            raise UserError(f"{what} is still running in {file.parent}{who}: {remedy}")
        if time.monotonic() - began > PATIENCE_SECONDS:
            raise UserError(f"{what} was killed in {file.parent}{who}, but its processes have not ended: stop them")
        if lock.holder and not told:
            told = True
            here = "was killed", "until its processes have stopped"
            how, until = here if lock.holder.local else ("may have been killed", "for a sign of life")
            print(f"{what} {how} in {file.parent}{who}: waiting {until}", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()
