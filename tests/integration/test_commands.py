"""The commands as a user runs them: what they print, their exit codes, and what bad input gets: one line, exit 2.

Most run in this process (support.call). Processes of their own: exit code 0 and 2 here, 75 in test_resume, DeepSpeed's
launcher in tests/distributed, torchrun in test_everything.
"""

import json
import shutil
import subprocess
import sys

import pytest
import support
import torch

from trainer import entry
from trainer.errors import RankError, Stopped, UserError

TINY = ("--config", str(support.TINY))


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one line on stderr that holds the words."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("disback:")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0]


def test_help_and_unknown_verbs():
    assert "backtrack" in support.verb("--help").stdout
    refused(support.verb("distil"), "unknown verb 'distil'")
    refused(support.call("record"), "--config")


# Prints which of these libraries are loaded after each call of `disback`.
IMPORTS = """
import sys
from trainer.cli import main

for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit:  # --help
        pass
    print("loaded:", *sorted({"torch", "diffusers", "deepspeed"} & sys.modules.keys()))
"""


def test_what_is_imported(root, tmp_path):
    """Help, `status` and `report` load no torch, building shards no DeepSpeed. tests/planner has `plan`."""
    run = shutil.copytree(root / "base", tmp_path / "run")
    config = f"--config {support.TINY} run={run}"
    calls = ["--help", "plan --help", "shards --help", "report --help", f"status {run}", f"report {config}"]
    calls += [f"shards --digits --out {tmp_path / 'digits'}"]
    command = [sys.executable, "-c", IMPORTS, *calls]
    done = subprocess.run(command, capture_output=True, text=True, env=support.environment())
    assert done.returncode == 0, done.stderr
    loaded = [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("loaded:")]
    assert loaded[:6] == [set()] * 6 and loaded[6] <= {"torch"}
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("error", "rank", "code", "line"),
    [
        (UserError("wrong"), 0, 2, "disback: wrong\n"),
        (UserError("wrong"), 1, 2, ""),  # rank 0 has said it
        (RankError("my file"), 1, 2, "disback: rank 1: my file\n"),
        (Stopped("saved"), 0, 75, "disback: saved\n"),
        (ZeroDivisionError("bug"), 1, 1, "ZeroDivisionError: bug\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, rank, code, line):
    def fail():
        raise error

    monkeypatch.setattr("trainer.distributed.group._rank", rank)
    monkeypatch.setattr(entry.time, "sleep", lambda seconds: None)
    assert entry.guarded(fail, debug=False) == code
    assert capsys.readouterr().err.endswith(line)


def test_unknown_key():
    refused(support.verb("record", *TINY, "record.stepz=3"), "unknown key 'record.stepz'", "'record.steps'")


def test_missing_shards(root, tmp_path):
    flags = [*support.places(root, "bad"), f"data.train={tmp_path}/none-*.tar"]
    refused(support.call("record", *TINY, *flags, f"path={tmp_path}/p"), "data.train", "none-*.tar")


def test_shard_without_captions(root, tmp_path):
    import tarfile

    source = next((root / "shards").glob("train-*.tar"))
    with tarfile.open(source) as old, tarfile.open(tmp_path / "s.tar", "w") as new:
        for member in old:
            if not member.name.endswith(".txt"):
                new.addfile(member, old.extractfile(member))
    flags = [*support.places(root, "bad"), f"data.train={tmp_path}/s.tar", f"path={tmp_path}/p"]
    refused(support.call("record", *TINY, *flags), f"{tmp_path}/s.tar", "caption", ".txt")


def test_truncated_tar(root, tmp_path):
    source = next((root / "shards").glob("train-*.tar"))
    raw = source.read_bytes()
    (tmp_path / "s.tar").write_bytes(raw[: len(raw) // 2])
    flags = [*support.places(root, "bad"), f"data.train={tmp_path}/s.tar", f"path={tmp_path}/p"]
    refused(support.call("record", *TINY, *flags), f"{tmp_path}/s.tar", "truncated")
    refused(support.call("shards", "--validate", f"{tmp_path}/s.tar"), "truncated")


def test_batch_that_does_not_divide(root):
    flags = [*support.places(root, "bad"), "backtrack.batch=9", "backtrack.accumulation=2"]
    refused(support.call("backtrack", *TINY, *flags), "backtrack.batch=9", "2 accumulation steps")


def test_path_of_another_teacher(root, tmp_path):
    shutil.copytree(root / "base" / "pipeline", tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    flags = [*support.places(root, "bad-teacher"), f"pipeline={tmp_path / 'pipeline'}"]
    refused(support.call("backtrack", *TINY, *flags), "recorded from another teacher")
    assert not (root / "bad-teacher" / "backtrack" / "metrics.jsonl").exists()


def test_missing_pipeline(root, tmp_path):
    refused(
        support.call("record", *TINY, *support.places(root, "bad"), f"pipeline={tmp_path}", f"path={tmp_path}/p"),
        "model_index.json is missing",
    )


def test_unwritable_run_folder(root, tmp_path):
    (tmp_path / "file").write_text("")
    flags = [*support.places(root, "bad"), f"run={tmp_path}/file/run", f"path={tmp_path}/p"]
    refused(support.call("record", *TINY, *flags), f"{tmp_path}/file/run", "cannot be written")


def test_debug_shows_the_traceback():
    done = support.call("record", *TINY, "sed=1", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_shards_of_a_folder(tmp_path):
    import torchvision

    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        torchvision.io.write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(tmp_path / "images" / f"{name}.png"))
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": "black"}))
    flags = ("--images", f"{tmp_path}/images", "--captions", f"{tmp_path}/captions.json", "--out", f"{tmp_path}/out")
    done = support.call("shards", *flags)
    assert done.returncode == 0 and "1 samples" in done.stdout and "no caption" in done.stdout
    done = support.call("shards", "--validate", f"{tmp_path}/out", "--decode")
    assert done.returncode == 0 and "1 usable samples" in done.stdout
    done = support.call("shards", "--index", f"{tmp_path}/out")
    assert done.returncode == 0 and "1 samples, members json, png, txt" in done.stdout
    refused(support.call("shards"), "--digits")
    refused(support.call("shards", *flags, "--per-shard", "0"), "--per-shard 0: must be at least 1")
    refused(support.call("shards", "--digits", "--seed", "-1"), "--seed -1: must be from 0 to 4294967295")


@pytest.mark.slow
def test_all_verbs_in_a_row(tmp_path, monkeypatch):
    """Shards to report with the tiny configuration, in a fresh folder, by the commands of the README; the first that trains
    in a process of its own."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments, config=TINY, start=support.call):
        done = start(name, *config, *arguments)
        assert done.returncode == 0, done.stderr
        return done

    run("shards", "--digits", config=())
    assert "ETA" in run("pretrain", start=support.verb).stderr
    assert "ETA" in run("record").stderr
    log = run("backtrack").stderr
    assert "target is node 2" in log and "target is node 0" in log and "ETA" in log
    tiny = tmp_path / "runs" / "tiny"
    keys = set(json.loads((tiny / "backtrack" / "metrics.jsonl").read_text().splitlines()[-1]))
    assert {"step", "images_seen", "mfu", "loss/gan_head", "target_node", "mismatch", "skipped_samples"} <= keys
    assert (tiny / "backtrack" / "samples" / "step-00000008.png").exists()
    assert list((tiny / "backtrack" / "tensorboard").iterdir()) and (tiny / "backtrack" / "log.txt").read_text()
    assert "world_size: 1" in (tiny / "config.yaml").read_text()
    run("evaluate", "--watch", "evaluate.what=[teacher,start,generator]")
    for what in ("teacher", "start", "generator", "step-00000004", "step-00000008"):
        scores = json.loads((tiny / "eval" / what / "metrics.json").read_text())
        assert scores["images"] == 64 and scores["fid"] > 0 and 0 <= scores["class_accuracy"] <= 1
        assert scores["clip_score"] is None and scores["checkpoint"]
        assert scores["pixel_fd"] > 0 and scores["colour_accuracy"] is None
        assert (tiny / "eval" / what / "grid.png").exists() and (tiny / "eval" / what / "prompts.png").exists()
    last, generator = (json.loads((tiny / "eval" / w / "metrics.json").read_text()) for w in (what, "generator"))
    assert generator["fid"] == pytest.approx(last["fid"], rel=1e-3)  # the same weights
    run("sample", "--out", "out", "--source", "step-00000004")
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4 and (tmp_path / "out" / "grid.png").exists()
    run("export", "--checkpoint", "step-00000004", "--out", "exported")
    assert (tmp_path / "exported" / "model_index.json").exists()
    refused(support.call("sample", *TINY, "--source", "nothing"), "'nothing' is not", "step-00000004")
    refused(support.call("export", *TINY, "--checkpoint", "step-9"), "step-00000004, step-00000008")
    printed = run("report").stdout
    assert "teacher" in printed and "report.html" in printed and (tiny / "figure.png").exists()
    page = (tiny / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 10 and "http" not in page.split("<h2>Configuration")[0]
    rows = json.loads((tiny / "summary.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["teacher", "start", "path"]
    assert rows[2]["generator_updates"] == 8 and rows[2]["sampling_steps"] == 1 and rows[2]["train_seconds"] > 0
    # Forward-equivalents. The teacher: 3 a step. Recording: 1 + 3 a step, and on the probe one sample, the teacher's
    # prediction and 8 measurements. Backtracking, 9 a step: fake score 1 + 3, guided target 2, generator 3 with its backward.
    assert [row["compute"] for row in rows] == [3 * 8, 0, 4 * 8 + 10 + 9 * 8]
    again = run("backtrack")  # finished: resumes at its end and changes nothing
    assert "resumed from" in again.stderr and "backtrack 8/8" not in again.stderr
