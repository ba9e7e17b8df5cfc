"""`disback status` and `--progress`: from files alone, and without torch."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import support

from trainer.status import main, progress, run_status


@pytest.fixture
def run(root, tmp_path):
    """A copy of the recorded run that may be changed."""
    return shutil.copytree(root / "base", tmp_path / "base")


def test_a_finished_run(run, capsys):
    status = run_status(run)
    assert status["stage"] == "record" and status["state"] == "finished" and status["step"] == status["steps"] == 8
    assert status["percent"] == 100 and status["checkpoint"] == "step-00000008" and status["restarts"] == 0
    assert set(status["stages"]) == {"autoencoder", "pretrain", "record"}
    assert main([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images_per_second"] == status["images_per_second"] > 0
    assert main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" finished ") == 3 and "checkpoint step-00000008" in printed


def test_a_run_in_the_middle(run):
    """Half of the lines, the last one being written; then silence; then a stop on a signal."""
    shutil.rmtree(run / "path")
    text = (run / "config.yaml").read_text().splitlines()
    (run / "config.yaml").write_text("\n".join(line for line in text if not line.startswith("path:")))  # the run's own
    folder = run / "record"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    (folder / "LATEST").write_text("step-00000004\n")
    log = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(log + "t WARNING record, step 4: it is slow\nt INFO resumed from step-00000004\n")
    status = run_status(run)
    assert status["state"] == "running" and status["step"] == 4 and status["percent"] == 50
    pace = json.loads(lines[1])["step_seconds"]
    assert status["eta_seconds"] == round(4 * pace)
    assert status["restarts"] == 1 and status["warnings"] == ["record, step 4: it is slow"]
    assert progress(run, "record") == "record step-00000004"
    assert progress(run, "pretrain") == "autoencoder step-00000008, pretrain step-00000008"
    assert progress(run, "evaluate") == "0 evaluations"
    old = time.time() - 7200
    for name in ("log.txt", "metrics.jsonl", "LATEST"):
        os.utime(folder / name, (old, old))
    status = run_status(run)["stages"]["record"]
    assert status["state"] == "stalled" and 7190 < status["silent_seconds"] < 7300
    with (folder / "log.txt").open("a") as stream:
        stream.write("t INFO record: stopped by a signal; saved x; run the same command again to go on\n")
    assert run_status(run)["state"] == "stopped"


def test_mistakes_and_no_torch(run, tmp_path):
    assert "no stage has written here" in support.verb("status", str(tmp_path / "none")).stderr
    assert support.verb("status").returncode == 2
    call = [sys.executable, "-X", "importtime", "-m", "trainer.cli", "status", str(run)]
    done = subprocess.run(call, capture_output=True, text=True, env=support.environment())
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "yaml" in imported
    assert not imported & {"torch", "deepspeed", "numpy", "pydantic", "diffusers"}
