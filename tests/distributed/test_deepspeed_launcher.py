"""Two processes under DeepSpeed's own launcher: Ctrl-C, and the same command again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import support

DEEPSPEED = Path(sys.executable).with_name("deepspeed")


def group_lives(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(root, tmp_path):
    """A terminal sends it to every process of the command. DeepSpeed's outer process dies of it at once, as by any Ctrl-C; the
    ranks save, and report 75."""
    folder, flags = root / "launched" / "backtrack", ["backtrack.loop.save_every=1000"]
    call = [DEEPSPEED, "--num_gpus", "2", "--master_port", str(support.free_port()), "--module", "trainer.backtrack"]
    call += ["--config", str(support.TINY), *support.places(root, "launched"), "backtrack.loop.sample_every=0"]
    env = support.environment() | {"DS_ACCELERATOR": "cpu"}
    log, lines = tmp_path / "log", folder / "metrics.jsonl"
    with log.open("w") as out:
        command = subprocess.Popen(
            [*call, *flags, "backtrack.steps=2000"],
            env=env | {"DISBACK_JOB_FOLDER": str(tmp_path)},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not (lines.exists() and lines.read_text()):
            assert time.monotonic() < deadline and command.poll() is None, log.read_text()
            time.sleep(0.05)
        os.killpg(command.pid, signal.SIGINT)
        assert command.wait(30) in (-signal.SIGINT, 1)  # by the signal, or 1 if its child reports first
        while group_lives(command.pid):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    assert (tmp_path / "exit").read_text().startswith("75 backtrack stopped at step "), log.read_text()
    latest = (folder / "LATEST").read_text().strip()
    assert f"checkpoints/{latest}; run the same command again" in (folder / "log.txt").read_text()
    step = int(latest.removeprefix("step-"))
    done = subprocess.run([*call, *flags, f"backtrack.steps={step + 2}"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {folder}/checkpoints/{latest}" in (folder / "log.txt").read_text()
    assert "world_size: 2" in (root / "launched" / "config.yaml").read_text()
    assert (root / "launched" / "generator" / "model_index.json").exists()
