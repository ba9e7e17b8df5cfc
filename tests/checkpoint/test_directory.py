"""The checkpoint directory alone: names, LATEST, what is complete, what is deleted. No torch, no training."""

import json
import re

import pytest

from trainer.checkpoint import directory
from trainer.checkpoint.directory import ABOUT, WEIGHTS, CheckpointDirectory, by_step, step_name, step_of
from trainer.config.schema import LoopSettings
from trainer.errors import UserError


def save(checkpoints: CheckpointDirectory, step: int, needs: tuple[str, ...] = (), size: int = 100) -> None:
    temporary = checkpoints.root / "new.tmp"
    (temporary / WEIGHTS).mkdir(parents=True)
    (temporary / WEIGHTS / "config.json").write_text("x" * size)
    (temporary / "rank-00000.pt").write_text("y" * size)
    checkpoints.publish(step, temporary, {"needs": list(needs)})


@pytest.fixture
def checkpoints(tmp_path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path / "backtrack", LoopSettings(keep_last=2, keep_weights_every=2, keep_every=5))


def test_names(tmp_path):
    assert step_name(500) == "step-00000500" and step_of("step-00000500") == 500
    assert step_of(step_name(10**9)) == 10**9
    for name in ("step-500", "step-00000500.tmp", "step-0000050x", "eval", ""):
        assert step_of(name) is None
    for name in ("step-00000012.png", "step-00000003.png", "step-00000004", "grid.png", "step-00000005.png.tmp"):
        (tmp_path / name).touch()
    assert list(by_step(tmp_path, ".png")) == [3, 12] and list(by_step(tmp_path)) == [4]
    assert by_step(tmp_path / "absent") == {}


def test_nothing_yet(checkpoints):
    assert checkpoints.latest() is None and checkpoints.latest_step() is None
    assert checkpoints.with_weights() == [] and checkpoints.complete() == [] and checkpoints.needed() == set()
    with pytest.raises(UserError, match="backtrack has no checkpoint yet: run `disback backtrack` first"):
        checkpoints.latest_weights()


def test_publish_and_delete(checkpoints):
    for step in range(1, 9):
        save(checkpoints, step, needs=(f"candidate-{step}",))
    assert checkpoints.complete() == [5, 7, 8] and checkpoints.complete(until=7) == [5, 7]
    assert checkpoints.with_weights() == [step_name(s) for s in (2, 4, 5, 6, 7, 8)]
    assert [p.name for p in checkpoints.place(4).iterdir()] == [WEIGHTS]
    assert checkpoints.needed() == {"candidate-5", "candidate-7", "candidate-8"}
    assert checkpoints.latest() == "step-00000008" and checkpoints.latest_step() == 8
    assert checkpoints.latest_weights() == checkpoints.weights("step-00000008") == checkpoints.place(8) / WEIGHTS
    assert checkpoints.size(8) == 200 and checkpoints.about(8)["step"] == 8
    reader = CheckpointDirectory(checkpoints.folder)
    assert reader.latest() == "step-00000008" and reader.complete() == [5, 7, 8]


def test_what_latest_names_is_never_discarded(checkpoints):
    save(checkpoints, 1)
    unfinished = checkpoints.root / "step-00000002.tmp"
    unfinished.mkdir()
    checkpoints.discard(unfinished, checkpoints.place(1))
    assert not unfinished.exists() and checkpoints.complete() == [1]


def test_damage_names_the_way_back(checkpoints):
    for step in (1, 2):
        save(checkpoints, step)
    about, problem = checkpoints.examine("step-00000002")
    assert about["step"] == 2 and problem is None
    (checkpoints.place(2) / "rank-00000.pt").write_text("cut")
    about, problem = checkpoints.examine("step-00000002")
    assert about is None and "step-00000002 is damaged (rank-00000.pt is missing or has another size)" in problem
    assert f"`echo step-00000001 > {checkpoints.latest_file}` goes back to it" in problem
    (checkpoints.place(1) / WEIGHTS / "config.json").unlink()
    assert "there is no older intact one" in checkpoints.examine("step-00000002")[1]
    file = checkpoints.place(2) / ABOUT
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    assert "has format 1; this version reads formats 3 and 4" in checkpoints.examine("step-00000002")[1]
    file.write_text("{")
    assert "is damaged" in checkpoints.examine("step-00000002")[1]


def test_room_is_made_but_not_of_the_latest(checkpoints, monkeypatch):
    """keep_last=2: of two checkpoints the older one goes before the save, the one that LATEST names does not."""
    for step in (3, 4):
        save(checkpoints, step)
    free = [0, 1000]
    monkeypatch.setattr(directory, "free_bytes", lambda folder: free.pop(0))
    checkpoints.make_room(6, 0)
    assert checkpoints.complete() == [4]
    free = [0, 0]
    with pytest.raises(OSError, match="nothing was written .loop.keep_last is 2."):
        checkpoints.make_room(6, 0)
    assert checkpoints.complete() == [4]


def test_an_empty_latest_starts_nothing_over(checkpoints):
    checkpoints.folder.mkdir()
    checkpoints.latest_file.write_text("")
    assert checkpoints.latest() is None  # nothing to lose
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.latest_file.write_text("\n")
    lost = (("\n", "is empty"), ("\0" * 14, "names no checkpoint"), ("step-2", "names no checkpoint .'step-2'"))
    for content, problem in (*lost, (b"\xff\xfe", "names no checkpoint"), (None, "is missing")):
        if content is None:
            checkpoints.latest_file.unlink()
        else:
            checkpoints.latest_file.write_bytes(content if isinstance(content, bytes) else content.encode())
        words = f"LATEST {problem}.*, but there are checkpoints: `echo step-00000002 > .*LATEST` resumes from the most recent"
        about, told = checkpoints.examine(checkpoints.latest())
        assert about is None and re.search(words, told)
        with pytest.raises(UserError, match=words):  # as sampling and export say it
            checkpoints.latest_weights()
    (checkpoints.place(2) / "rank-00000.pt").unlink()  # that one is not whole
    assert "`echo step-00000001 > " in checkpoints.examine("")[1]


def test_a_latest_that_names_what_is_gone(checkpoints):
    """Of what is there, the most recent before it; else the most recent."""
    for step in (3, 4, 8):
        save(checkpoints, step)
    assert checkpoints.complete() == [4, 8]
    assert "`echo step-00000004 > " in checkpoints.examine("step-00000006")[1]
    assert "`echo step-00000008 > " in checkpoints.examine("step-00000002")[1]


def test_what_a_killed_save_left_goes_before_the_next(checkpoints):
    save(checkpoints, 2)
    for name in ("step-00000003.tmp", "step-00000002.tmp"):
        (checkpoints.root / name / "engines").mkdir(parents=True)
    checkpoints.remove_unfinished()
    assert [path.name for path in checkpoints.root.iterdir()] == ["step-00000002"]
