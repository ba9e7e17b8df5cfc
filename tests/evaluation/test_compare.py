"""`disback compare` and `disback seeds`: what scores cost, over seeds and at equal compute."""

import math
from pathlib import Path

import pytest
import yaml
from result_files import COCO, make_run, write_lines
from support import REPOSITORY, TINY, verb

from trainer.compare import main
from trainer.evaluation.costs import cost_to, score_at, spread
from trainer.seeds import experiment, records, tasks_of

POINTS = [{"compute": 0.0, "fid": 16.0}, {"compute": 10.0, "fid": 4.0}, {"compute": 20.0, "fid": 8.0}]


def test_costs_and_scores_between_points():
    assert cost_to(POINTS, "fid", 8.0) == pytest.approx(5) and cost_to(POINTS, "fid", 4.0) == pytest.approx(10)
    assert cost_to(POINTS, "fid", 20.0) == 0 and cost_to(POINTS, "fid", 3.9) == math.inf
    assert score_at(POINTS, "fid", 5.0) == pytest.approx(8) and score_at(POINTS, "fid", 99.0) == 8
    assert math.isnan(score_at(POINTS[1:], "fid", 5.0))
    below = [{"compute": 0.0, "kid": 0.3}, {"compute": 10.0, "kid": -0.1}]  # no logarithm
    assert cost_to(below, "kid", 0.1) == pytest.approx(5) and score_at(below, "kid", 5.0) == pytest.approx(0.1)
    assert spread([1.0, 2.0, 3.0]) == "2.00 +- 1" and spread([2.0]) == "2.00" and spread([math.inf]) == "never"
    assert spread([1.0, 3.0, math.inf]) == "2.00 +- 1.4 (2 of 3)"


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Plain distillation and the walk with two seeds each; the recording costs 200 of the walk's compute."""
    none = [make_run(tmp_path / f"none-{seed}", "none", seed=seed, shift=seed / 10) for seed in (1, 2)]
    walk = [make_run(tmp_path / f"walk-{seed}", seed=seed, shift=-seed / 10) for seed in (1, 2)]
    for folder in walk:
        write_lines(folder / "record" / "metrics.jsonl", {"step": 20, "time": 9.0, "compute": 200.0, "gpu_hours": 0.4})
    return [*none, *walk]


def test_table(runs, capsys):
    assert main([*map(str, runs), "--metrics", "fid", "--to", "10", "3.0"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("protocol heldout a1b2c3d4e5f6; cost in forward passes on 32 images")
    head, none, walk = (line.split() for line in shown[3:])
    assert head == ["seeds", "FID", "at", "900", "to", "10", "gain", "to", "3", "gain"]  # the plain runs' end
    # FID is 3 + 60 exp(-step / 20) at every 20th step, the generator's own 3 at step 100, compute 9 a step (+ 200).
    assert none[:2] == ["none", "2"] and float(none[2]) == pytest.approx(3.15, abs=0.01)
    assert walk[:2] == ["path", "2"] and none[-2:] == ["never", "-"] and walk[-1] == "-"
    cost, other = float(none[5]), float(walk[5])
    assert 2 * 180 < cost < 3 * 180 and other == pytest.approx(cost + 200, abs=25)
    assert none[8] == "1.00x" and float(walk[8].rstrip("x")) == pytest.approx(cost / other, abs=0.02)


def test_own_thresholds_and_other_costs(runs, capsys):
    assert main([*map(str, runs[:2]), "--axis", "gpu_hours"]) == 0
    shown = capsys.readouterr().out
    assert "device-hours" in shown and "\nFID\n" in shown and "\npixel FD\n" in shown and "1.00x" in shown


def test_mistakes(runs, tmp_path, capsys):
    other = make_run(tmp_path / "coco", "none", protocol=COCO)
    short = make_run(tmp_path / "short", "none", last=10)
    for arguments, message in (
        ([runs[0], other], "0 scored checkpoints under protocol heldout a1b2c3d4e5f6"),
        ([short], "1 scored checkpoints"),
        ([tmp_path], "has no config.yaml"),
        ([runs[0], "--to", "3"], "--to are thresholds of one metric"),
        ([runs[0], "--metrics", "cmmd"], "not every scored checkpoint has cmmd"),
        ([runs[0], "--metrics", "kid"], "invalid choice"),
    ):
        assert main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def test_where_the_runs_of_a_seed_are():
    """Each seed has one path, recorded by the configuration that it belongs to; the teacher is everyone's."""
    files = [REPOSITORY / "configs" / f"digits{kind}.yaml" for kind in ("_none", "_warm", "")]
    folders = [Path("runs/digits-none"), Path("runs/digits-warm"), Path("runs/digits")]
    none, warm, walk = (experiment(file, 4, ["backtrack.steps=5"], folders) for file in files)
    assert [run.settings.run for run in (none, warm, walk)] == [f"{folder}-seed-4" for folder in folders]
    assert {run.settings.path for run in (none, warm, walk)} == {"runs/digits-seed-4/path"}
    assert {run.settings.pipeline for run in (none, warm, walk)} == {"runs/digits/pipeline"}
    assert {run.settings.seed for run in (none, warm, walk)} == {4}
    assert [records(run) for run in (none, warm, walk)] == [False, False, True]
    assert [task.verb for task in tasks_of(walk)] == ["record", "backtrack", "evaluate"]
    alone = experiment(files[1], 4, [], folders[1:2])  # without the configuration that records
    assert alone.settings.path == "runs/digits-warm-seed-4/path" and records(alone)


@pytest.mark.slow
def test_one_command_trains_scores_and_compares(root, tmp_path):
    """The same command again has nothing left to train."""
    own = {"extends": str(TINY), "pipeline": str(root / "base" / "pipeline"), "path": "", "run": str(tmp_path / "none")}
    own["data"] = {"train": f"{root}/shards/train-*.tar", "heldout": f"{root}/shards/heldout-*.tar"}
    own |= {"backtrack": {"path": "none"}, "evaluate": {"classifier": str(root / "classifier")}}
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(own))
    command = [str(tmp_path / "none.yaml"), "--seeds", "7", "--processes", "1", "backtrack.loop.sample_every=0"]
    first = verb("seeds", *command)
    assert first.returncode == 0, first.stderr
    rows = [line.split()[:2] for line in first.stdout.splitlines()]
    assert rows.count(["none", "1"]) == 2  # of FID and of pixel FD
    (made,) = tmp_path.rglob("generator/disback.json")
    written = made.stat().st_mtime_ns
    again = verb("seeds", *command)
    assert again.stdout == first.stdout and made.stat().st_mtime_ns == written
