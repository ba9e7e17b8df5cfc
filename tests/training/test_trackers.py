"""Trackers: what W&B gets offline, over a restart too; that no tracker ends training; and device-hours."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import support
import torch
import torchvision
import wandb
from accelerate import PartialState
from torchvision.io import read_image

from trainer.backtrack import Backtracking
from trainer.checkpoint.directory import CheckpointDirectory
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.training import trackers
from trainer.training.loop import Stopwatch, train
from trainer.training.metrics import MetricsWriter
from trainer.training.progress import Progress
from trainer.training.run import Run

QUICK = ("backtrack.steps=6", "backtrack.fake_updates=1", "backtrack.loop.log_every=1", "backtrack.loop.save_every=3")
TRACKED = (*QUICK, "backtrack.loop.trackers=[wandb]")


class Crashing(Backtracking):
    """Backtracking whose process dies in a step, as far as its files can tell."""

    crash_at = -1

    def update(self, step):
        if step == self.crash_at:
            raise RuntimeError("crash")
        super().update(step)


class Unplugged(Backtracking):
    """Backtracking during which W&B's own process is killed."""

    def update(self, step):
        if step == 3:
            os.kill(wandb_process(), signal.SIGKILL)
        super().update(step)


UNPLUGGED = """
import sys
from pathlib import Path

import support
from test_trackers import TRACKED, Unplugged, backtrack
from trainer.distributed.world import start

flags = (*TRACKED, "backtrack.loop.trackers=[wandb,tensorboard]")
backtrack(support.single(Path(sys.argv[1]), "unplugged", start(), *flags), Unplugged)
"""


def wandb_process() -> int:
    """The process that writes and uploads for W&B: the newest child of this one that runs wandb-core."""
    own = Path(f"/proc/{os.getpid()}/task")
    children = [int(pid) for task in own.iterdir() for pid in (task / "children").read_text().split()]
    return max(pid for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """W&B without a server; its process and threads end with each test."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    wandb.teardown()


def backtrack(run: Run, kind: type[Backtracking] = Backtracking, **trouble: int) -> Path:
    """Trains stage 2; the stage's folder."""
    folder = run.stage_folder("backtrack")
    stage = kind(run)
    for name, value in trouble.items():
        setattr(stage, name, value)
    train(stage, run.settings.backtrack.loop, run.settings.health, folder, run.world)
    return folder


def wandb_records(folder: Path) -> list[list[dict]]:
    """The records of every W&B file of a stage, in the order of its processes, as wandb's own command reads them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    outputs = [subprocess.run([*command, file], capture_output=True, text=True, check=True).stdout for file in files]
    return [[json.loads(line) for line in output.splitlines()] for output in outputs]


def history(records: list[dict]) -> dict[int, dict]:
    """Step -> what was logged there."""
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return {item["_step"]: item for item in items}


def numbers(line: dict) -> dict[str, float]:
    """The values of a metrics line that a tracker gets."""
    return {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_wandb_offline_over_a_crash(root, world):
    """The process dies after step 5, resumes from step 3 and repeats steps 4 and 5: the same run, with every line."""
    run = support.single(root, "tracked", world, *TRACKED, "backtrack.loop.sample_every=3")
    with pytest.raises(RuntimeError, match="crash"):
        backtrack(run, Crashing, crash_at=5)
    folder = run.folder / "backtrack"
    ids = (folder / trackers.RUN_IDS).read_text()
    died = {line["step"]: line for line in lines(folder)}
    backtrack(run)
    assert (folder / trackers.RUN_IDS).read_text() == ids and not (folder / "tensorboard").exists()
    before, after = wandb_records(folder)
    for records in (before, after):
        (about,) = (record["run"] for record in records if record["type"] == "run")
        assert about["run_id"] == json.loads(ids)["wandb"] and about["resume"]
        assert (about["project"], about["display_name"]) == ("disback", "tracked/backtrack")
    configs = [[r["config"]["update"] for r in records if r["type"] == "config"] for records in (before, after)]
    resolved = run.settings.model_dump(mode="json")
    assert len(configs[0]) == 1 and not configs[1]  # logged once, by the process that began the run
    assert configs[0][0] == resolved
    assert list(history(before)) == [0, 1, 2, 3, 4, 5] and list(history(after)) == [4, 5, 6]
    for step, line in died.items():
        assert numbers(line).items() <= history(before)[step].items()
    for line in lines(folder):
        if line["step"] > 3:  # the lines of the restart, as they stand in the file now
            assert numbers(line).items() <= history(after)[line["step"]].items()
    assert {"loss/fake_score", "mismatch", "gpu_hours", "lr/generator"} <= history(after)[6].keys()
    for step, records in ((0, before), (3, before), (6, after)):
        (name,) = history(records)[step]["samples.filenames"]
        (image,) = folder.glob(f"wandb/offline-run-*/files/{name}")
        assert torch.equal(read_image(str(image)), read_image(str(folder / "samples" / f"step-{step:08d}.png")))


def test_a_tracker_that_dies_does_not_end_training(root):
    """W&B's process is killed in step 4: one warning, and TensorBoard and metrics.jsonl go on. In a process of its own, since
    a thread of W&B's would log errors during later tests."""
    env = support.environment()
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(support.RANKS.parent), str(Path(__file__).parent)])
    done = subprocess.run([sys.executable, "-c", UNPLUGGED, root], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = root / "unplugged" / "backtrack"
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]
    text = (folder / "log.txt").read_text()
    assert text.count("wandb failed and gets nothing more") == text.count(" WARNING ") == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("gpu_hours")] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_cannot_start_does_not_end_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    kept = trackers.Trackers(["wandb", "tensorboard"], tmp_path, 0, {})
    kept.scalars(1, {"loss": 2.0})
    kept.close()
    assert caplog.text.count("wandb failed and gets nothing more") == 1 and "no such mode" in caplog.text
    assert not (tmp_path / trackers.RUN_IDS).exists() and list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_hangs_does_not_end_training(root, world, monkeypatch):
    """A save waits for it once, with one warning. The others lose that one line at most, and what was to come is not lost."""
    held, real = threading.Event(), trackers.TensorBoard.scalars

    class Hanging(trackers.TensorBoard):
        def __init__(self, folder, *args):
            super().__init__(folder / "hanging", 0)

        def scalars(self, step, values):
            if step == 2:
                held.wait(60)

    monkeypatch.setitem(trackers.SERVICES, "wandb", Hanging)
    monkeypatch.setattr(Hanging, "id", "x", raising=False)
    monkeypatch.setattr("trainer.training.metrics.HANG_SECONDS", 2.0)
    seen = []
    monkeypatch.setattr(trackers.TensorBoard, "scalars", lambda *args: seen.append(args[1]) or real(*args))
    flags = ("backtrack.loop.sample_every=2", "backtrack.loop.trackers=[wandb,tensorboard]")
    folder = backtrack(support.single(root, "hanging", world, *QUICK, *flags))
    assert not held.is_set() and [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]
    assert seen == [1, 3, 4, 5, 6]
    assert len(list((folder / "samples").iterdir())) == 4
    text = (folder / "log.txt").read_text()
    assert text.count("wandb failed and gets nothing more") == text.count(" WARNING ") == 1
    assert "it has not answered for" in text
    held.set()  # the thread that was left goes on, and ends with the line that it held
    deadline = time.monotonic() + 10
    while len(seen) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert seen[5:] == [2]


def test_grids_are_written_while_training_goes_on(root, world, monkeypatch):
    """The first grid's compression lasts until a later step has begun; a save waits for it, and so does the end."""
    seen, begun, written = [], threading.Event(), torchvision.io.write_png

    class Training(Backtracking):
        def update(self, step):
            seen.append(f"step {step}")
            if step == 1:
                begun.set()
            super().update(step)

    def slow(grid, file):
        assert begun.wait(60) and threading.current_thread() is not threading.main_thread()
        written(grid, file)
        seen.append(Path(file).stem)

    def saved(self, step):
        seen.append(f"saved {step}")
        real(self, step)

    real = Progress.saved
    monkeypatch.setattr(torchvision.io, "write_png", slow)
    monkeypatch.setattr(Progress, "saved", saved)
    flags = ("backtrack.loop.sample_every=3", "backtrack.loop.trackers=[tensorboard]")
    folder = backtrack(support.single(root, "behind", world, *QUICK, *flags), Training)
    order = [seen.index(what) for what in ("step 1", "step-00000000", "saved 3")]
    assert order == sorted(order)
    for step in (3, 6):  # the grid of a save's own step, too
        assert seen.index(f"step-{step:08d}") < seen.index(f"saved {step}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    for image in board.Images("samples"):
        file = folder / "samples" / f"step-{image.step:08d}.png"
        assert image.encoded_image_string == file.read_bytes()
        assert (3, image.height, image.width) == tuple(read_image(str(file)).shape)
    assert [image.step for image in board.Images("samples")] == [0, 3, 6]
    assert [event.step for event in board.Scalars("gpu_hours")] == [1, 2, 3, 4, 5, 6]


def test_a_grid_that_cannot_be_written_does_not_end_training(tmp_path, world, caplog):
    (tmp_path / "samples").write_text("in the way")
    writer = MetricsWriter(tmp_path, world, "name", 2, 0, [], {})
    writer.image(1, torch.zeros(3, 4, 4, dtype=torch.uint8))
    writer.close()
    assert "step-00000001.png cannot be written" in caplog.text


def test_a_missing_package_is_named_before_training(root, world, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if not installed, even where it is
    run = support.single(root, "untracked", world, *QUICK, "backtrack.loop.trackers=[tensorboard,mlflow]")
    with pytest.raises(UserError, match="^loop.trackers: mlflow is not installed: pip install mlflow$"):
        backtrack(run)
    assert not (run.folder / "backtrack" / "metrics.jsonl").exists()


def test_the_former_setting_is_an_unknown_key(root):
    with pytest.raises(UserError, match="tensorboard"):
        support.tiny(root, "old", "backtrack.loop.tensorboard=true")


def test_accelerate_takes_this_process_for_a_single_one(world, monkeypatch):
    """Under a launcher it would choose a device and write variables, or join the process group."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before, threads = dict(os.environ), torch.get_num_threads()
    PartialState._reset_state()
    trackers.act_alone()
    state = PartialState()
    assert (state.num_processes, state.is_main_process, state.device.type) == (1, True, "cpu")
    assert not state.use_distributed and dict(os.environ) == before and torch.get_num_threads() == threads


def test_nested_settings_as_dotted_keys():
    assert trackers.flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_device_hours_count_every_process():
    """Four processes, then a restart with two: each second counts for all processes of its time."""
    first = Stopwatch(0, 0.0, 0.0, processes=4)
    first.lap(5)
    assert first.gpu_hours == pytest.approx(first.seconds * 4 / 3600) and first.seconds > 0
    second = Stopwatch(5, first.seconds, first.gpu_hours, processes=2)
    second.lap(8)
    later = second.seconds - first.seconds
    assert later > 0 and second.gpu_hours == pytest.approx((first.seconds * 4 + later * 2) / 3600)


def test_device_hours_over_a_restart(root, world):
    """One process: hours follow from seconds in every line. A checkpoint of a version that did not count them loads, and
    counts its seconds for as many processes as there are now."""
    run = support.single(root, "hours", world, *QUICK)
    with pytest.raises(RuntimeError, match="crash"):
        backtrack(run, Crashing, crash_at=4)
    directory = CheckpointDirectory(run.folder / "backtrack")
    checkpoint = directory.root / directory.latest()
    file = checkpoint / "rank-00000.pt"
    state = torch.load(file, weights_only=True)
    seconds, hours = state["seconds"], state.pop("gpu_hours")
    assert hours == pytest.approx(seconds / 3600) and seconds > 0
    torch.save(state, file)
    about = json.loads((checkpoint / "state.json").read_text())
    about["files"]["rank-00000.pt"] = file.stat().st_size
    (checkpoint / "state.json").write_text(json.dumps(about))
    folder = backtrack(Run(run.settings, World(0, 1, 0, world.device)))
    for line in lines(folder):
        assert line["gpu_hours"] == pytest.approx(line["time"] / 3600)
    assert lines(folder)[-1]["gpu_hours"] > hours
