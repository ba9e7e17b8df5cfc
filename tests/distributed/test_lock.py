"""The lock of a folder: refused while its owner lives, waited for while it ends, taken over when it is dead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import support

from trainer.distributed import lock
from trainer.distributed.lock import LOCK, Lock, Owner, locked
from trainer.errors import UserError
from trainer.evaluation.results_folder import ResultsFolder

# Holds a lock until its stdin ends; on another node, as far as a lock knows.
HOLDER = """
import os, sys, time
from pathlib import Path
from trainer.distributed import lock

if len(sys.argv) > 2:
    lock._processes_seen = lambda: "another machine"
    lock.BEAT_SECONDS = float(sys.argv[2])
with lock.locked(Path(sys.argv[1]), "disback record"):
    print("taken", flush=True)
    sys.stdin.read()
"""
AWAY = {"SLURMD_NODENAME": "n7", "SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "0"}


class Holder:
    """A process that holds a lock file."""

    def __init__(self, file: Path, *beat: str, **env: str):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        call = [sys.executable, "-c", HOLDER, str(file), *beat]
        self.process = subprocess.Popen(call, env=support.environment() | env, text=True, **pipes)
        assert self.process.stdout.readline() == "taken\n", self.process.stderr.read()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "record" / LOCK


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.1)


def lose_locks(monkeypatch) -> None:
    """As on a file system that has no locks, which this machine has none of."""

    def flock(file, flags):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def test_its_owner_is_named_and_its_end_gives_it_back(file, monkeypatch):
    holder = Holder(file, "60", **AWAY)
    words = f"disback record is still running in {file.parent} .process {holder.process.pid} of .* on node n7, Slurm job 4711, since 20"
    with pytest.raises(UserError, match=words), locked(file, "disback record"):
        pass
    holder.process.communicate("")
    began = time.monotonic()
    with locked(file, "disback record"):
        assert json.loads(file.read_text())["process"] == os.getpid()
    assert file.read_text() == "" and time.monotonic() - began < 1  # nothing to wait for
    assert not [path for path in file.parent.iterdir() if path != file]


def test_a_killed_owner_on_this_node_is_replaced_at_once(file):
    Holder(file).kill()
    began = time.monotonic()
    with locked(file, "disback record"):
        assert time.monotonic() - began < 1


def test_a_killed_owner_elsewhere_is_replaced_after_its_last_sign_of_life(file, quick, capsys):
    Holder(file, "0.2", **AWAY).kill()
    began = time.monotonic()
    with locked(file, "disback record"):
        assert 0.5 < time.monotonic() - began < 5
    assert "disback record may have been killed in" in capsys.readouterr().err


def test_signs_of_life_suffice_where_there_are_no_locks(file, monkeypatch, quick):
    lose_locks(monkeypatch)
    holder = Holder(file, "0.2", **AWAY)
    with pytest.raises(UserError, match="still running .* on node n7, Slurm job 4711"), locked(file, "disback record"):
        pass
    holder.kill()
    with locked(file, "disback record"):
        assert Owner.read(file.open()).process == os.getpid()


def test_two_that_start_at_the_same_time_where_there_are_no_locks(file, monkeypatch):
    lose_locks(monkeypatch)
    locks = [Lock(file), Lock(file)]
    assert locks[0]._owner.token != locks[1]._owner.token
    taken: list[bool] = []
    threads = [threading.Thread(target=lambda one=one: taken.append(one.attempt())) for one in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 2 and sum(taken) <= 1  # none if their records were mixed; then they try again
    for one in locks:
        one._ended.set()


def test_a_dead_node_loses_even_a_lock_that_its_file_server_keeps(file, quick, monkeypatch):
    """A stopped process stands for a dead node: its lock stays, its signs of life do not. If it comes back, it ends."""
    holder = Holder(file, "0.2", **AWAY)
    holder.process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="on node n7"), locked(file, "disback record"):
        pass
    old = time.time() - 400
    os.utime(file, (old, old))
    with locked(file, "disback record"):
        holder.process.send_signal(signal.SIGCONT)
        assert holder.process.wait(10) == 1
        assert f"{file} was taken over by process {os.getpid()} of" in holder.process.communicate()[1]


def test_an_earlier_start_of_the_same_slurm_job_is_waited_for(file, quick, monkeypatch):
    holder = Holder(file, "0.2", **AWAY)
    for name, value in (AWAY | {"SLURM_RESTART_COUNT": "1"}).items():
        monkeypatch.setenv(name, value)
    threading.Timer(0.5, holder.process.stdin.close).start()
    with locked(file, "disback record"):
        assert holder.process.wait(5) == 0


def test_two_jobs_in_one_run_folder(root, tmp_path):
    """The second one is refused before it writes anything, by every stage and wherever it would write."""
    run = tmp_path / "run"
    common = ("--config", str(support.TINY), f"run={run}", f"data.train={root}/shards/train-*.tar")
    ours = (*common, f"pipeline={root}/base/pipeline", f"path={run}/path")
    calls = {"pretrain": common, "record": ours, "backtrack": (*ours, "backtrack.path=none")}
    for verb, arguments in calls.items():
        with locked(run / verb / LOCK, verb):
            done = support.call(verb, *arguments)
        assert (
            done.returncode == 2
            and f"disback {verb} is still running in {run / verb} (process {os.getpid()}" in done.stderr
        )
        assert "name another run folder (run=...)" in done.stderr
    with locked(run / "path" / LOCK, "another run"):  # that records the same path
        assert "still running" in support.call("record", *ours).stderr
    assert sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()) == [
        f"{place}/{LOCK}" for place in ("backtrack", "path", "pretrain", "record")
    ]


def test_evaluations_take_turns(tmp_path, monkeypatch, quick, world):
    monkeypatch.setattr("trainer.evaluation.results_folder.LOCK_SECONDS", 0.1)
    holder = Holder(tmp_path / LOCK, "0.2", **AWAY)
    threading.Timer(0.5, holder.process.stdin.close).start()
    with ResultsFolder(tmp_path).claimed(world):
        assert holder.process.wait(5) == 0
        assert Owner.read((tmp_path / LOCK).open()).process == os.getpid()
    assert (tmp_path / LOCK).read_text() == ""


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: File exists"), locked(tmp_path / "file" / LOCK, "x"):
        pass


def test_a_dead_process_that_nobody_waited_for_holds_nothing():
    """In a container whose first process does not reap, killed owners stay in the process table."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert lock._start_of(child.pid)
    child.kill()
    deadline = time.monotonic() + 10
    while lock._start_of(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert Path(f"/proc/{child.pid}").exists()
    child.wait()
