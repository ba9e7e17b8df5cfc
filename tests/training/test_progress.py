"""`status.json`: what it keeps over restarts, and that writing it never gets in the way of training."""

import json

import pytest

from trainer.training.progress import FILE, WARNINGS_KEPT, Progress

LINE = {"step": 10, "step_seconds": 0.5, "images_per_second": 64.0, "target_node": 3, "loss/fake_score": 1.0}


def test_what_is_written(tmp_path):
    progress = Progress(tmp_path, "backtrack", 100, 10, True)
    progress.begin(None)
    begun = Progress.read(tmp_path)
    assert begun["state"] == "running" and begun["step"] == begun["restarts"] == 0 and begun["step_seconds"] is None
    progress.line(10, LINE)
    progress.saved(12)
    progress.end("stopped", "by a signal")
    now = Progress.read(tmp_path)
    assert now["stage"] == "backtrack" and now["steps"] == 100 and now["log_every"] == 10
    assert (now["step"], now["step_seconds"], now["images_per_second"], now["target_node"]) == (12, 0.5, 64.0, 3)
    assert now["saved_step"] == 12 and begun["started"] <= now["saved"] <= now["updated"]
    assert now["state"] == "stopped" and now["message"] == "by a signal" and "loss/fake_score" not in now


def test_restarts_and_warnings_go_on(tmp_path):
    progress = Progress(tmp_path, "record", 100, 10, True)
    progress.begin(None)
    progress.line(10, LINE)
    progress.saved(10)
    progress.line(20, LINE, [f"warning {number}" for number in range(WARNINGS_KEPT)])
    progress.line(30, LINE, [f"warning {number}" for number in range(WARNINGS_KEPT, WARNINGS_KEPT + 5)])
    progress.end("failed", "no space")
    for restarts in (1, 2):
        Progress(tmp_path, "record", 200, 10, True).begin(10)
        now = Progress.read(tmp_path)
        assert (now["state"], now["message"], now["restarts"]) == ("running", "", restarts)
        assert now["step"] == now["saved_step"] == 10 and now["steps"] == 200 and now["step_seconds"] == 0.5
        assert now["warnings"][-1] == f"warning {WARNINGS_KEPT + 4}" and len(now["warnings"]) == WARNINGS_KEPT
        assert now["warning_count"] == WARNINGS_KEPT + 5
    Progress(tmp_path, "record", 100, 10, True).begin(None)  # died before its first checkpoint: a new start
    assert Progress.read(tmp_path)["restarts"] == Progress.read(tmp_path)["warning_count"] == 0
    (tmp_path / FILE).unlink()
    Progress(tmp_path, "record", 100, 10, True).begin(10)  # a run of an earlier version
    assert Progress.read(tmp_path)["restarts"] == 0


def test_only_the_main_rank_writes(tmp_path):
    progress = Progress(tmp_path, "record", 100, 10, False)
    progress.begin(None)
    progress.line(10, LINE)
    progress.end("finished")
    assert not list(tmp_path.iterdir()) and Progress.read(tmp_path) is None


def test_a_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    """Killed in the middle of a write: the file is the one before."""
    progress = Progress(tmp_path, "record", 100, 10, True)
    progress.begin(None)

    def killed(text, file, durable):
        file.with_name(file.name + ".tmp").write_text(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trainer.training.progress.write_text", killed)
        progress.line(10, LINE)
    assert Progress.read(tmp_path)["step"] == 0
    progress.line(20, LINE)
    assert Progress.read(tmp_path)["step"] == 20 and [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    """Training goes on, with one warning for all failures in a row; what was missed is written when it can be."""
    folder = tmp_path / "gone"
    progress = Progress(folder, "record", 100, 10, True)
    progress.begin(None)
    progress.line(10, LINE, ["it is slow"])
    progress.end("finished")
    ours = [record.getMessage() for record in caplog.records if record.name == "disback"]
    assert [message.partition(" cannot")[0] for message in ours] == [str(folder / FILE)]
    folder.mkdir()
    progress.saved(20)
    now = json.loads((folder / FILE).read_text())
    assert now["step"] == 20 and now["warnings"] == ["it is slow"] and now["state"] == "finished"
