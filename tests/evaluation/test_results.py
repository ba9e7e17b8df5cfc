"""Results of runs read from their folders, and the report made of them: without torch, without a process group."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch
import yaml
from torchvision.io import write_png

from trainer.checkpoint.directory import step_name
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.evaluation.results import Results, as_json, as_text, table
from trainer.evaluation.sources import find_source
from trainer.report import main
from trainer.training.run import Run


def write(file: Path, *lines: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def scores(fid: float, accuracy: float | None = 0.5) -> dict:
    found = {"fid": fid, "class_accuracy": accuracy, "images": 64}
    return found | {"features": "digits", "reference": "held-out", "credit": "somebody <b>"}


def make_run(folder: Path, kind: str = "walk", last: int = 10, **places: str) -> Path:
    """A run folder with results, as small as they can be."""
    backtrack = {"path": kind, "fake_updates": 5, "batch": 32}
    config = {"backtrack": backtrack, "sample": {"steps": 25}, "path": "", "pipeline": ""}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config | places))
    keys = {"mismatch": 0.5, "target_node": 3, "loss/fake_score": 1.0, "grad_norm/generator": None}
    write(
        folder / "backtrack" / "metrics.jsonl",
        *({"step": s, "time": 2.0 * s, "compute": 9.0 * s} | keys for s in range(5, last + 1, 5)),
    )
    with (folder / "backtrack" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "ti')  # being written
    for what, fid in (("generator", 3.0), (step_name(10), 3.0), (step_name(5), 4.0)):
        write(folder / "eval" / what / "metrics.json", scores(fid))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """A run of the method with teacher and path, and an ablation that uses both."""
    run = make_run(tmp_path / "path")
    for what, fid in (("teacher", 1.0), ("start", 90.0)):
        write(run / "eval" / what / "metrics.json", scores(fid))
    write(run / "pretrain" / "metrics.jsonl", {"step": 1, "time": 7.0, "loss/teacher": 1.0})
    write(
        run / "record" / "metrics.jsonl",
        {"step": 1, "time": 3.0, "compute": 30.0, "distance": 0.1, "loss/fake_score": 1.0},
    )
    for what in ("teacher", "start", "generator"):
        write_png(torch.zeros(3, 8, 24, dtype=torch.uint8), str(run / "eval" / what / "prompts.png"))
        about = {"prompts": ["a seven", "an eight", "a nine <3"], "sampling_steps": 25 if what == "teacher" else 1}
        (run / "eval" / what / "settings.yaml").write_text(yaml.safe_dump(about))
    nodes = [{"index": i, "step": 10 * i, "distance_to_node_0": 0.1 * i} for i in range(3)]
    write(run / "path" / "path.json", {"nodes": nodes})
    (run / "backtrack" / "samples").mkdir()
    for step in range(0, 100, 10):
        write_png(
            torch.zeros(3, 4, 4, dtype=torch.uint8), str(run / "backtrack" / "samples" / f"{step_name(step)}.png")
        )
    places = {"path": str(run / "path"), "pipeline": str(run / "pipeline")}
    return [run, make_run(tmp_path / "none", "none", last=15, **places), make_run(tmp_path / "warm", "warm", **places)]


def test_results(runs, tmp_path):
    run = Results(runs[0])
    assert run.label == "path" and run.curve("backtrack", "mismatch") == ([5, 10], [0.5, 0.5])
    assert run.curve("backtrack", "grad_norm/generator") == run.curve("absent", "mismatch") == ([], [])
    assert [(step, s["fid"]) for step, s in run.evaluations_over_steps()] == [(5, 4.0), (10, 3.0)]
    assert [step for step, _ in run.grids("backtrack")] == list(range(0, 100, 10))
    assert run.evaluation("absent") is None
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        Results(tmp_path)


def test_the_final_table(runs):
    """Compute and time: recording counts where the path is used, also one that another run recorded. The run that trained for
    longer stands there twice: at equal updates, and at its end."""
    rows = table([Results(run) for run in runs])
    assert [(r.label, r.sampling_steps, r.generator_updates, r.compute, r.fid, r.train_seconds) for r in rows] == [
        ("teacher", 25, 0, None, 1.0, 7.0),
        ("start", 1, 0, 0.0, 90.0, 0.0),
        ("none", 1, 2, 90.0, 3.0, 20.0),
        ("none", 1, 3, 135.0, 3.0, 30.0),
        ("warm", 1, 2, 120.0, 3.0, 23.0),
        ("path", 1, 2, 120.0, 3.0, 23.0),
    ]
    assert [row["label"] for row in json.loads(as_json(rows))["rows"]] == [row.label for row in rows]
    text = as_text(rows).splitlines()
    assert len(text) == 7 and len({len(line) for line in text}) == 1
    assert "FID" in text[0] and "colour" not in text[0]  # no row has one


def test_a_report(runs, tmp_path, capsys, monkeypatch):
    call = ["--config", str(support.TINY), f"run={runs[0]}", f"report.compare=[{runs[1]}, {tmp_path}/absent]"]
    monkeypatch.setenv("RANK", "1")
    assert main(call) == 0 and not (runs[0] / "report.html").exists() and not capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert main(call) == 0 and "teacher" in capsys.readouterr().out
    page = (runs[0] / "report.html").read_text()
    # Evaluations 2, sample grids 6 of 10, backtracking 3 (one metric is null), recording 2, the teacher 1, the prompts.
    assert page.count("data:image/png;base64,") == 15 and "http" not in page
    assert "Training images: somebody &lt;b&gt;." in page and (runs[0] / "figure.png").exists()
    assert "node 2: step 20, distance 0.2000" in page
    assert [row["label"] for row in json.loads((runs[0] / "summary.json").read_text())["rows"]] == [
        "teacher", "start", "none", "none", "path",
    ]  # fmt: skip
    assert main([*call[:2], f"run={tmp_path}"]) == 2 and "has no config.yaml" in capsys.readouterr().err


def test_a_report_needs_no_torch(runs):
    call = [sys.executable, "-X", "importtime", "-m", "trainer.report", "--config", str(support.TINY), f"run={runs[0]}"]
    done = subprocess.run(call, capture_output=True, text=True, env=support.environment())
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0 and (runs[0] / "report.html").exists()
    assert "matplotlib" in imported and not imported & {"torch", "deepspeed", "diffusers"}


def test_a_checkpoint_by_its_path(shards, pipeline, tmp_path):
    """Results of a checkpoint that is named by a path, absolute or not, go to eval/<its name>, not into the checkpoint."""
    settings = support.tiny(shards, "by-path", f"pipeline={pipeline}")
    run = Run(settings, World(0, 1, 0, torch.device("cpu")))
    weights = run.folder / "backtrack" / "checkpoints" / "step-00000004" / "weights"
    weights.mkdir(parents=True)
    (weights / "config.json").touch()
    for what in ("step-00000004", str(weights.parent), os.path.relpath(weights.parent)):
        source = find_source(run, what)
        assert source.name == "step-00000004" and source.weights.resolve() == weights
    with pytest.raises(UserError, match=r"'step-9' is not .*\(step-00000004\)"):
        find_source(run, "step-9")
