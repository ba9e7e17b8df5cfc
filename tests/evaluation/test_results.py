"""Results of runs read from their folders, and the tables made of them: without torch, without a process group."""

import json
import os
import shutil
import statistics
from pathlib import Path

import pytest
import support
import torch
import yaml
from result_files import COCO, HELDOUT, add_teacher, copy_without, make_run, scores, write_lines, write_scores

from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.evaluation.results import ProtocolId, Results, one_line
from trainer.evaluation.sources import find_source
from trainer.evaluation.table import (
    as_json,
    as_text,
    differences,
    explanation,
    group_runs,
    main_protocol,
    tables,
)
from trainer.training.run import Run

SHARED = ("path", "pipeline")


@pytest.fixture
def main(tmp_path) -> Path:
    """A run of the method, with teacher and path."""
    run = make_run(tmp_path / "main")
    add_teacher(run)
    return run


def beside(main: Path, name: str, kind: str, **more: object) -> Path:
    """A run with the teacher and path of another."""
    return make_run(main.parent / name, kind, **more, **{key: str(main / key) for key in SHARED})


def table_of(*runs: Path):
    found = tables(group_runs([Results(run) for run in runs]))
    assert len(found) == 1
    return found[0]


def test_results(main, tmp_path):
    run = Results(main)
    assert run.kind == "path" and run.curve("backtrack", "mismatch")[0] == list(range(5, 101, 5))
    assert run.curve("backtrack", "grad_norm/generator")[0][-2:] == [90, 95]  # null at 100
    assert run.curve("absent", "mismatch") == ([], [])
    heldout = ProtocolId(**{"name": HELDOUT["protocol"], "hash": HELDOUT["protocol_hash"]})
    averaged, raw = (run.scores_over_steps(heldout, raw) for raw in (False, True))
    assert list(averaged) == list(raw) == [20, 40, 60, 80, 100]
    assert all(raw[step]["fid"] == pytest.approx(1.3 * averaged[step]["fid"]) for step in raw)
    assert run.scores_over_steps(ProtocolId("heldout", "another")) == {} and run.evaluation("absent") is None
    assert [step for step, _ in run.grids("backtrack")] == [20, 40, 60, 80, 100]
    assert [node["images"].name for node in run.nodes()] == [f"node-000{i}.png" for i in range(3)]
    assert "sdxl" not in run.evaluated() and run.evaluated()[0] == "generator" and "nodes" not in run.evaluated()
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        Results(tmp_path)
    (main / "eval" / "teacher" / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="not JSON .*: evaluate teacher again"):
        Results(main).evaluation("teacher")


def test_files_are_read_once(main, monkeypatch):
    run, read, opened = Results(main), Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda file, *args: opened.append(file) or read(file, *args))
    for _ in range(2):
        tables(group_runs([run]))
        assert run.generator_cost(40).compute == 360 + 200
    assert opened and max(opened.count(file) for file in opened if file.suffix != ".yaml") == 1


def test_the_folder_of_the_evaluations(main):
    """A setting of the run; a run of an earlier version has `eval`."""
    (main / "eval").rename(main / "eval-coco")
    assert Results(main).evaluated() == [] and Results(main, "eval-coco").evaluation("generator")
    config = yaml.safe_load((main / "config.yaml").read_text())
    (main / "config.yaml").write_text(yaml.safe_dump(config | {"evaluate": {"folder": "eval-coco"}}))
    assert Results(main).evaluation("generator")


def test_the_costs_of_earlier_versions(main):
    """Without gpu_hours in the lines: time by the number of processes."""
    old = Results(copy_without(main, main.parent / "old", "gpu_hours"))
    assert old.cost("backtrack", 40).gpu_hours == pytest.approx(36 * 40 * 2 / 3600)
    assert Results(main).cost("backtrack", 40).gpu_hours == pytest.approx(0.02 * 40)
    assert old.cost("backtrack", 4).gpu_hours is None  # before the first line nothing is known


def test_the_table(main):
    """Compute and hours: recording counts where the path is used, also one that another run recorded. The run that trained
    for longer stands there twice: at equal updates, and at its end."""
    none, warm = beside(main, "none", "none", last=120, shift=1.0), beside(main, "warm", "warm")
    write_scores(main, "sdxl-turbo", scores(7.0))
    table = table_of(main, none, warm)
    columns = ("sampling_steps", "generator_updates", "compute", "train_seconds", "fid")
    assert [(r.label, *(r.values[c] for c in columns)) for r in table.rows] == [
        ("teacher", 25, 0, 30.0, 700.0, 1.2),
        ("start", 1, 0, 0.0, 0.0, 90.0),
        ("sdxl-turbo", 1, None, None, None, 7.0),
        ("none", 1, 20, 900.0, 3600.0, pytest.approx(4.404, abs=1e-3)),
        ("none", 1, 24, 1080.0, 4320.0, 4.0),
        ("warm", 1, 20, 1100.0, 4320.0, 3.0),
        ("path", 1, 20, 1100.0, 4320.0, 3.0),
    ]
    assert table.rows[3].values["gpu_hours"] == 2.0 and table.rows[6].values["gpu_hours"] == pytest.approx(2.4)
    rows = json.loads(as_json([table]))["rows"]
    assert [row["label"] for row in rows] == [row.label for row in table.rows]
    assert rows[-1] | HELDOUT == rows[-1] and rows[-1]["seeds"] == 1 and not [key for key in rows[-1] if "_std" in key]
    assert {"patch_fid", "clip_score", "cmmd", "fd_dinov2", "pick_score", "hps_v2_1", "gpu_hours"} <= rows[-1].keys()
    text = as_text(table).splitlines()
    assert len(text) == 8 and len({len(line) for line in text}) == 1
    assert "FID" in text[0] and "colour" not in text[0] and "seeds" not in text[0]  # no row has one
    assert "Protocol: heldout a1b2c3d4e5f6." in explanation(table) and "somebody" in explanation(table)


def test_compute_is_counted_in_batches_of_the_first_run(main):
    backtrack = {"path": "none", "fake_updates": 5, "batch": 16, "steps": 100}
    half = beside(main, "half", "none", backtrack=backtrack)
    runs = [Results(main), Results(half, unit=Results(main).unit)]
    assert tables(group_runs(runs))[0].rows[2].values["compute"] == 450


def test_seeds_are_one_row(main):
    """With teachers and paths of their own, or those of the first run; mean and deviation, and how many."""
    own = make_run(main.parent / "s1", seed=1, shift=0.5, path=f"{main.parent}/s1/path")
    add_teacher(own)
    shared = beside(main, "s2", "walk", seed=2, shift=1.3)
    others = [beside(main, f"n{s}", "none", seed=s, shift=s) for s in (0, 1)]
    groups = group_runs([Results(run) for run in (main, own, *others, shared)])
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("path", [0, 1, 2]),
        ("none", [0, 1]),
    ]
    teacher, _, none, path = tables(groups)[0].rows
    fids = [3.0, 3.5, 4.3]
    assert path.values["fid"] == pytest.approx(statistics.fmean(fids)) and path.seeds == 3 and none.seeds == 2
    assert path.std["fid"] == pytest.approx(statistics.stdev(fids)) and "compute" not in path.std
    assert teacher.seeds == 2  # the third run shares the first one's
    row = json.loads(as_json(tables(groups)))["rows"][-1]
    assert row["fid_std"] == path.std["fid"] and row["seeds"] == 3 and row["images"] == 64
    assert "3.60 +- 0.66" in as_text(tables(groups)[0]) and "seeds" in as_text(tables(groups)[0]).splitlines()[0]


def test_what_is_no_group(main):
    """Another setting, the same seed again, or another number of updates: no spread over seeds."""
    other = make_run(main.parent / "other", seed=1, sample={"steps": 50, "prompts": []})
    again = make_run(main.parent / "again")
    groups = group_runs([Results(run) for run in (main, other, again)])
    assert [group.label for group in groups] == ["path: main", "path: other", "path: again"]
    unfinished = make_run(main.parent / "s3", seed=3)
    shutil.rmtree(unfinished / "eval" / "generator")
    lines = Results(unfinished).lines("backtrack")
    write_lines(unfinished / "backtrack" / "metrics.jsonl", *lines[:12])
    for step in (80, 100):
        shutil.rmtree(unfinished / "eval" / f"step-{step:08d}")
    rows = table_of(main, unfinished).rows
    assert [(row.label, row.values["generator_updates"], row.seeds) for row in rows[2:]] == [
        ("path", 20, 1),
        ("path", 12, 1),
    ]


def test_protocols_are_kept_apart(main):
    """By name and by hash; runs of the first one's protocol come first, whatever else was evaluated."""
    write_scores(main, "teacher", scores(1.5, protocol="heldout", protocol_hash="ffff"))
    coco = beside(main, "coco", "none", protocol=COCO, more={"images": 10000, "published": {"DMD2": {"fid": 19.01}}})
    old = copy_without(beside(main, "warm", "warm"), main.parent / "old", "protocol", "protocol_hash")
    runs = [Results(run) for run in (main, coco, old)]
    first, *others = tables(group_runs(runs))
    assert [row.label for row in first.rows] == ["start", "path"] and first.protocol == main_protocol(runs[0])
    assert {str(t.protocol): [row.label for row in t.rows] for t in others} == {
        "heldout ffff": ["teacher"],
        "dmd2-coco10k 0f1e2d3c4b5a": ["none"],
        "unknown protocol": ["warm"],
    }
    published = next(table for table in others if table.protocol.name == "dmd2-coco10k")
    assert [(row.label, row.values["fid"]) for row in published.published] == [("DMD2", 19.01)]
    assert "DMD2 (published)" in as_text(published) and "DMD2" not in as_text(first)
    assert "images 10000 instead of 64" in differences(published, first)
    found = json.loads(as_json([first, *others]))
    assert len(found["rows"]) == 5 and found["published"] == [{"label": "DMD2", "fid": 19.01} | COCO]


def test_names_on_one_line():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("\x1b[31m\u202e\udcff \u05d0") == "\ufffd[31m\ufffd\ufffd \u05d0"


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
