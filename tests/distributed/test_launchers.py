"""Ranks end with their launcher, also when nobody could tell them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import support

from trainer.distributed.launchers import _program, launcher_processes

RANK = """
import os, pathlib, sys, time
from trainer.distributed.group import set_environment
from trainer.distributed.launchers import end_with_launcher

set_environment()
end_with_launcher()
pathlib.Path(sys.argv[1], str(os.getpid())).touch()
time.sleep(60)
"""


def test_ranks_end_with_a_killed_torchrun(tmp_path):
    """torchrun puts them into sessions of their own: neither a signal to its group nor a hangup reaches them."""
    (tmp_path / "rank.py").write_text(RANK)
    started = tmp_path / "started"
    started.mkdir()
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    log = tmp_path / "log"
    with log.open("w") as stream:
        launcher = subprocess.Popen(
            [*line, tmp_path / "rank.py", started],
            env=support.environment() | {"DISBACK_JOB_FOLDER": str(tmp_path)},
            stderr=stream,
        )
        deadline = time.monotonic() + 60
        while len(list(started.iterdir())) < 2:
            assert time.monotonic() < deadline and launcher.poll() is None, log.read_text()
            time.sleep(0.1)
    ranks = [int(file.name) for file in started.iterdir()]
    assert all(os.getsid(rank) != os.getsid(launcher.pid) for rank in ranks)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 5
    while alive := [rank for rank in ranks if Path(f"/proc/{rank}").exists()]:
        assert time.monotonic() < deadline, f"{alive} live on"
        time.sleep(0.05)
    assert log.read_text().count("because the launcher that started it was killed") == 2
    assert (tmp_path / "exit").read_text().startswith("1 rank ")


def test_what_is_a_launcher():
    """The demo is none, though it names one: it stops its ranks itself."""
    lines = {
        "python -m torch.distributed.run --nproc-per-node 2 x.py": "torch.distributed.run",
        "/v/bin/python3.11 -X dev -u -m deepspeed.launcher.launch --x": "deepspeed.launcher.launch",
        "/v/bin/python /v/bin/torchrun --standalone": "torchrun",
        "python -m trainer.cli demo --launcher torchrun": "trainer.cli",
        "bash -c torchrun": "bash",
        "python": "",
    }
    assert {line: _program(line.split()) for line in lines} == lines
    assert launcher_processes() == []  # of this test
