"""Checkpoints on real disks: which are kept, full disks, damaged checkpoints."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import support
import torch
from ranks_elastic import stop_recording
from safetensors.torch import load_file

from models.architecture import find_architecture
from trainer.checkpoint import directory
from trainer.checkpoint.collective_errors import DeferredErrors
from trainer.errors import RankError, UserError
from trainer.planner.stages import BacktrackPlan
from trainer.record import record
from trainer.training.run import Run

QUICK = ("backtrack.loop.save_every=1", *support.zero("zero1"))


def checkpoints(run: Run, stage: str = "backtrack") -> Path:
    return run.folder / stage / "checkpoints"


def whole(run: Run, stage: str = "backtrack") -> list[int]:
    return sorted(int(f.parent.name[5:]) for f in checkpoints(run, stage).glob("*/state.json"))


@pytest.fixture(scope="module")
def kept(root, world):
    """A run that saved at every step, and its weights."""
    loop = ("backtrack.loop.keep_last=2", "backtrack.loop.keep_every=3", "backtrack.loop.keep_weights_every=4")
    run = support.single(root, "kept", world, *QUICK, *loop)
    return run, support.backtrack_weights(run)


def test_what_is_kept(kept):
    run, _ = kept
    assert whole(run) == [3, 6, 7, 8]
    assert sorted(p.name for p in checkpoints(run).iterdir()) == [f"step-{s:08d}" for s in (3, 4, 6, 7, 8)]
    assert [p.name for p in (checkpoints(run) / "step-00000004").iterdir()] == ["weights"]


def test_saves_are_timed(kept):
    run, _ = kept
    lines = [json.loads(line) for line in (run.folder / "backtrack" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["save_seconds"] for line in lines if line["step_seconds"]]
    assert logged[0] > 0 and all(seconds > 0 for seconds in logged)  # at every step a save, at every second a line


def test_rank_files_hold_nothing_that_could_run(kept):
    """They load where pickle may build tensors and plain containers only, in a new process that knows no other class."""
    run, _ = kept
    file = checkpoints(run) / "step-00000008" / "rank-00000.pt"
    code = f"import torch; state = torch.load({str(file)!r}, weights_only=True); print(sorted(state))"
    done = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True, env=support.environment())
    assert done.stdout.strip() == "['generators', 'gpu_hours', 'health', 'seconds', 'stage']", done.stderr


def test_a_damaged_checkpoint_names_the_way_back(root, world, kept, tmp_path):
    """The latest is cut short, the one before lacks a file: the message's own command goes back to the one before that,
    and the run ends as it would have; also if an earlier version saved that one."""
    run, weights = kept
    folder = tmp_path / "backtrack"
    shutil.copytree(run.folder / "backtrack", folder)
    again = Run(run.settings.model_copy(update={"run": str(tmp_path)}), world)
    file = next((folder / "checkpoints" / "step-00000008").rglob("*model_states.pt"))
    file.write_bytes(file.read_bytes()[:1000])
    (folder / "checkpoints" / "step-00000007" / "rank-00000.pt").unlink()
    with pytest.raises(UserError, match="model_states.pt is missing or has another size") as caught:
        support.backtrack_weights(again)
    command = str(caught.value).split("`")[1]
    assert command == f"echo step-00000006 > {folder / 'LATEST'}"
    subprocess.run(command, shell=True, check=True)
    about = folder / "checkpoints" / "step-00000006" / "state.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 3}))
    assert support.largest_difference(weights, support.backtrack_weights(again)) == 0.0
    assert whole(again) == [3, 6, 7, 8]  # what was damaged is written anew


def test_damage_that_has_the_right_size(root, world, kept, tmp_path):
    run, _ = kept
    shutil.copytree(run.folder / "backtrack", tmp_path / "backtrack")
    file = next((checkpoints(run) / "step-00000008").rglob("*optim_states.pt"))
    file = tmp_path / file.relative_to(run.folder)
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(RankError, match=r"step-00000008 is damaged.*echo step-00000007 >"):
        support.backtrack_weights(Run(run.settings.model_copy(update={"run": str(tmp_path)}), world))


def test_an_older_recording_has_its_candidates(root, world):
    """Going back behind a candidate that was let go since: it is still there, and the path comes out the same."""
    flags = (*support.RECORDING, "record.loop.save_every=1", "record.loop.keep_every=2", "record.nodes=1")
    flags = (*flags, "record.probe_every=1")
    path = root / "going-back-path"
    record(Run(support.tiny(root, "went-through", *flags, f"path={root / 'through-path'}"), world))
    flags = (*flags, f"path={path}")
    stop_recording(root, "going-back", world, flags, at=7)
    run = Run(support.tiny(root, "going-back", *flags), world)
    there = {p.name for p in (path / "candidates").iterdir()}
    needs = {
        s: set(json.loads((checkpoints(run, "record") / f"step-{s:08d}/state.json").read_text())["needs"])
        for s in whole(run, "record")
    }
    assert whole(run, "record") == [2, 4, 6, 7]
    assert there == set.union(*needs.values())
    assert needs[2] - needs[7]  # a candidate that only the older one needs
    (run.folder / "record" / "LATEST").write_text("step-00000002\n")
    record(run)
    one, two = (json.loads((p / "path.json").read_text())["nodes"] for p in (root / "through-path", path))
    assert [n["sha256"] for n in one] == [n["sha256"] for n in two]


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes and gives its folder."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        call = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(run: Run) -> int:
    return sum(json.loads((checkpoints(run) / "step-00000008" / "state.json").read_text())["files"].values())


def test_no_room_for_a_checkpoint(root, world, kept, small_disk):
    """It is said before anything is written, with the last good step; with room made, the run goes on to its end."""
    run, weights = kept
    disk = small_disk(int(2.6 * size_of(run)))
    tight = Run(support.tiny(root, str(disk), *QUICK, "backtrack.loop.keep_every=1"), world)
    with pytest.raises(UserError) as caught:
        support.backtrack_weights(tight)
    message = str(caught.value)
    assert "checkpoint of step 3 could not be saved: it takes about" in message and "nothing was written" in message
    assert f"the last good one is {checkpoints(tight) / 'step-00000002'}" in message
    assert sorted(p.name for p in checkpoints(tight).iterdir()) == ["step-00000001", "step-00000002"]
    tight = Run(support.tiny(root, str(disk), *QUICK, "backtrack.loop.keep_last=1"), world)
    shutil.rmtree(checkpoints(tight) / "step-00000001")
    assert support.largest_difference(weights, support.backtrack_weights(tight)) == 0.0


def test_room_is_made_from_what_would_go_anyway(root, world, kept, small_disk):
    run, weights = kept
    disk = small_disk(int(2.6 * size_of(run)))  # two whole ones and the third do not fit at once
    tight = Run(support.tiny(root, str(disk), *QUICK, "backtrack.loop.keep_last=2"), world)
    assert support.largest_difference(weights, support.backtrack_weights(tight)) == 0.0
    assert whole(tight) == [7, 8]


def test_a_first_checkpoint_is_estimated(root, world, kept, small_disk):
    """Of the first one only the parameters are known: the estimate is near, and above."""
    run, _ = kept
    disk = small_disk(size_of(run) // 2)
    with pytest.raises(UserError, match=r"it takes about 0\.0\d+ GB.*there is no earlier one") as caught:
        support.backtrack_weights(Run(support.tiny(root, str(disk), *QUICK), world))
    said = float(str(caught.value).split("about ")[1].split(" GB")[0]) * 1e9
    assert 0.95 < said / size_of(run) < 1.4


def test_weights_for_evaluation_are_float32(root, world, monkeypatch):
    """Also those of a bf16 run, whose training weights are not; the estimate of a first checkpoint and the plan count them."""
    estimates, make_room = [], directory.CheckpointDirectory.make_room
    monkeypatch.setattr(
        directory.CheckpointDirectory,
        "make_room",
        lambda self, step, size: estimates.append(size) or make_room(self, step, size),
    )
    flags = (*QUICK, "precision=bf16", "backtrack.save_raw=true", "backtrack.steps=1", "backtrack.fake_updates=1")
    run = support.single(root, "bf16-weights", world, *flags)
    weights = support.backtrack_weights(run)
    folder = checkpoints(run) / "step-00000001"
    for name in ("weights", "weights-raw"):
        state = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        assert all(value.dtype == torch.float32 for value in state.values())
        assert any(not torch.equal(value, value.bfloat16().float()) for value in state.values())
        live = "ema" if name == "weights" else "generator"
        assert all(torch.equal(value.bfloat16().float(), weights[f"{live}.{key}"]) for key, value in state.items())
    written = sum(json.loads((folder / "state.json").read_text())["files"].values())
    planned = BacktrackPlan(run.settings, find_architecture(str(root / "base" / "pipeline")), 1).checkpoint
    assert estimates[0] == pytest.approx(written, rel=0.1) and planned == pytest.approx(written, rel=0.1)


def test_a_disk_that_fills_up_during_the_save(root, world, kept, small_disk, monkeypatch):
    """A real ENOSPC in DeepSpeed's, our own or safetensors' writing: wherever the disk ends."""
    run, _ = kept
    monkeypatch.setattr(directory, "MARGIN", 0.0)  # others took the space after it was looked at
    sizes = json.loads((checkpoints(run) / "step-00000008" / "state.json").read_text())["files"]
    for share in (0.1, 0.9):  # in the engines, in the weights at the end
        disk = small_disk(int((2 + share) * sum(sizes.values())))
        tight = Run(support.tiny(root, str(disk), *QUICK, "backtrack.loop.keep_last=4"), world)
        with pytest.raises(UserError, match=r"step 3 could not be saved.*(space|os error 28).*step-00000002"):
            support.backtrack_weights(tight)
        assert (disk / "backtrack" / "LATEST").read_text() == "step-00000002\n"
        assert sorted(p.name for p in checkpoints(tight).iterdir()) == ["step-00000001", "step-00000002"]


def test_deferred_errors_keep_their_number(world):
    """By which the job script knows those that may be gone at the next start."""
    errors = DeferredErrors(world)
    with errors.defer():
        raise OSError(errno.ESTALE, "Stale file handle")
    assert "Stale file handle" in errors.agree() and errors.errno == errno.ESTALE
    assert errors.agree() is None


def test_a_vanished_file_system_ends_with_the_last_step(root, world, kept, small_disk):
    """The run folder is gone at the second save: one message, no traceback from inside DeepSpeed."""
    run, _ = kept

    class Unplugged(support.Interrupted):
        def update(self, step):
            if step == 1:
                shutil.rmtree(checkpoints(away))
                checkpoints(away).write_text("not a folder any more")
            return super().update(step)

    away = Run(support.tiny(root, str(small_disk(10 * size_of(run))), *QUICK), world)
    with pytest.raises(UserError, match="checkpoint of step 2 could not be saved.*file system"):
        support.backtrack_weights(away, Unplugged)
