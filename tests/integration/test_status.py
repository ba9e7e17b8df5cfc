"""`disback status` and `--progress`: from files alone, and without torch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import support
import yaml

from trainer.status import main, page, progress, run_status
from trainer.training.progress import FILE, Progress

LINE = {"step_seconds": 2.0, "images_per_second": 64.0, "target_node": None, "images_seen": 640, "epoch": 1.25}


def test_a_finished_run(root, capsys):
    """What real training leaves behind."""
    run = root / "base"
    status = run_status(run)
    assert status["stage"] == "record" and status["state"] == "finished" and status["step"] == status["steps"] == 8
    assert status["percent"] == 100 and status["checkpoint"] == "step-00000008" and status["restarts"] == 0
    assert set(status["stages"]) == {"autoencoder", "pretrain", "record"}
    assert all((run / stage / FILE).exists() for stage in status["stages"])
    assert main([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images_per_second"] == status["images_per_second"] > 0
    assert main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" finished ") == 3 and "checkpoint step-00000008" in printed


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as the trainer leaves it at step 4 of 8 of recording, its log not fit for reading."""
    folder = tmp_path / "run"
    (folder / "record").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"path": "", "record": {"steps": 8, "loop": {"log_every": 2}}}))
    (folder / "record" / "log.txt").write_bytes(b"\0 WARNING \xff\nresumed from\nstopped by a signal")
    for resumed_at, step in ((None, 2), (2, 4)):
        trainer = Progress(folder / "record", "record", 8, 2, True)
        trainer.begin(resumed_at)
        trainer.line(step, LINE)
    (folder / "record" / "LATEST").write_text("step-00000004\n")
    return folder


def age(folder: Path, seconds: float, *names: str) -> None:
    for name in names or (FILE, "log.txt", "metrics.jsonl", "LATEST"):
        if (folder / name).exists():
            os.utime(folder / name, (time.time() - seconds,) * 2)


def test_a_run_in_the_middle(run):
    folder = run / "record"
    status = run_status(run)
    assert status["state"] == "running" and status["step"] == 4 and status["percent"] == 50
    assert (
        status["eta_seconds"] == 8
        and status["images_per_second"] == 64
        and status["target_node"] is None
        and status["epoch"] == 1.25
    )
    assert status["restarts"] == 1 and status["warnings"] == [] and status["checkpoint"] == "step-00000004"
    assert progress(run, "record") == "record step-00000004"
    assert progress(run, "pretrain") == "no checkpoint"
    assert progress(run, "evaluate") == "0 evaluations"
    age(folder, 500)
    assert run_status(run)["state"] == "running"
    age(folder, 700)
    status = run_status(run)
    assert status["state"] == "stalled" and 690 < status["silent_seconds"] < 800
    assert status["checkpoint_age_seconds"] == pytest.approx(status["silent_seconds"], abs=5)
    assert "nothing written for 11 min" in page(status)


def test_the_end_of_a_run(run):
    """Stopped or failed is what the trainer said last, unless the log shows a new start; finished needs the result."""
    folder = run / "record"
    trainer = Progress(folder, "record", 8, 2, True)
    trainer.begin(4)
    trainer.line(4, {}, ["step 4: it is slow"])
    trainer.end("stopped")
    age(folder, 7200)
    status = run_status(run)
    assert status["state"] == "stopped" and status["warnings"] == ["step 4: it is slow"] and status["restarts"] == 2
    assert "the same command" in page(status) and "1 warnings" in page(status) and "slow" in page(status)
    age(folder, 5, "log.txt")  # started again, still loading
    assert run_status(run)["state"] == "running"
    trainer.end("failed", "a gradient was not finite")
    status = run_status(run)
    assert status["state"] == "failed" and "a gradient was not finite" in page(status)
    trainer.line(8, LINE)
    trainer.end("finished")
    assert run_status(run)["state"] == "running"  # the nodes are not chosen yet
    (run / "path").mkdir()
    (run / "path" / "path.json").write_text("{}")
    assert run_status(run)["state"] == "finished"


def test_a_run_of_an_earlier_version(run):
    """No status.json: the last whole metrics line with a speed, and LATEST."""
    folder = run / "record"
    (folder / FILE).unlink()
    lines = [{"step": 2} | LINE, {"step": 3} | LINE, {"step": 4, "step_seconds": None}, {"step": 6} | LINE]
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text[:-10])  # the last one is being written
    status = run_status(run)
    assert (status["state"], status["step"], status["steps"], status["checkpoint"]) == (
        "running",
        4,
        8,
        "step-00000004",
    )
    assert status["restarts"] == 0 and status["warnings"] == []
    (folder / "LATEST").unlink()
    assert run_status(run)["step"] == 3
    age(folder, 7200)
    assert run_status(run)["state"] == "stalled"
    (folder / "metrics.jsonl").unlink()
    assert run_status(run)["step"] == 0 and "no checkpoint yet" in page(run_status(run))


def test_evaluations_by_protocol(run, capsys):
    """One line each, whatever folder they are in; those of earlier versions name no protocol."""

    def evaluated(place: str, **found: object) -> None:
        file = run / place / "metrics.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(found))

    heldout, coco = (
        {"protocol": name, "protocol_hash": digest} for name, digest in (("heldout", "a1"), ("coco", "b2"))
    )
    evaluated("eval/generator", fid=12.3, **heldout)
    evaluated("eval/teacher", fid=None, clip_score=0.3, **heldout)
    for step in range(100, 600, 100):
        evaluated(f"eval/step-{step:08d}", fid=step / 10, **heldout)
    evaluated("eval/start", fid=1.0, protocol="heldout", protocol_hash="c3")
    evaluated("eval-coco/generator", fid=None, clip_score=0.3125, **coco)
    evaluated("eval-coco/generator.tmp", fid=1.0, **coco)
    evaluated("eval-old/generator", fid=7.0)
    evaluated("eval-more/generator", fid=13.0, **heldout)
    evaluated("classifier/other", accuracy=0.9)
    (run / "eval" / "start" / "metrics.json.tmp").write_text("{")
    lines = page(run_status(run)).splitlines()
    assert [line for line in lines if "evaluations)" in line] == [
        "  FID (heldout a1)  generator 12.3, step-00000300 30, step-00000400 40, step-00000500 50, "
        "eval-more/generator 13 (8 evaluations)",
        "  FID (heldout c3)  start 1 (1 evaluations)",
        "  clip_score (coco b2)  generator 0.3125 (1 evaluations)",
        "  FID (unknown protocol)  generator 7 (1 evaluations)",
    ]
    assert progress(run, "evaluate") == "11 evaluations"
    assert main([str(run), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["evaluations"]
    assert [(entry["protocol"], entry["protocol_hash"]) for entry in entries] == [
        ("heldout", "a1"), ("heldout", "c3"), ("coco", "b2"), (None, None),
    ]  # fmt: skip
    assert entries[2]["metric"] == "clip_score" and entries[2]["values"] == {"generator": 0.3125}


def test_mistakes_and_no_torch(run, tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2 and "no stage has written here" in capsys.readouterr().err
    assert main([]) == 2
    call = [sys.executable, "-X", "importtime", "-m", "trainer.cli", "status", str(run)]
    done = subprocess.run(call, capture_output=True, text=True, env=support.environment())
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "yaml" in imported
    assert not imported & {"torch", "deepspeed", "numpy", "diffusers"}
