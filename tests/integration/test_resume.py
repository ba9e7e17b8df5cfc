"""A run that is stopped, or killed, and started again is the run that was never stopped: the same program, so the same bits
of weights and metrics."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import support
import torch

from trainer.errors import UserError


def test_products_do_not_depend_on_where_arrays_lie(capfd):
    """MKL reports its mode of conditional numerical reproducibility (CNR)."""
    if not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch has no MKL")
    with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
        torch.ones(8, 8) @ torch.ones(8, 8)
    ctypes.CDLL(None).fflush(None)
    said = capfd.readouterr().out
    assert "SGEMM" in said and "CNR:OFF" not in said


def assert_same(root, one, other, weights, other_weights):
    assert support.largest_difference(weights, other_weights) == 0.0
    assert support.metrics(root / one / "backtrack") == support.metrics(root / other / "backtrack")


FLAGS = (
    "backtrack.fake_updates=2",
    "backtrack.reuse_x0=true",
    "backtrack.loop.log_every=3",
    "backtrack.accumulation=2",
)


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_process_interrupted_twice(root, world, adaptive):
    flags = [*FLAGS, "backtrack.loop.sample_every=4"]  # previews leave no trace
    if adaptive:
        flags = [*FLAGS, "backtrack.walk.mode=adaptive", "backtrack.walk.interval=1", "backtrack.walk.most=2"]
    name = "adaptive" if adaptive else "fixed"
    whole = support.backtrack_weights(support.single(root, f"whole-{name}", world, *flags))
    run = support.single(root, f"parts-{name}", world, *flags)
    assert support.backtrack_weights(run, signal_at=(2,)) is None
    assert (run.folder / "backtrack" / "LATEST").read_text() == "step-00000002\n"
    assert support.backtrack_weights(run, signal_at=(5,)) is None
    parts = support.backtrack_weights(run)
    assert_same(root, f"whole-{name}", f"parts-{name}", whole, parts)
    nodes = [line["target_node"] for line in support.metrics(run.folder / "backtrack")]
    assert nodes == sorted(nodes, reverse=True) and nodes[-1] < nodes[0]


@pytest.fixture(scope="module")
def two_ranks(root):
    support.ranks("resume", root)
    return root / "resume"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "sharded"])
def test_two_ranks_interrupted(root, two_ranks, stage):
    """By a signal to rank 1 alone; at ZeRO 2 then by a save that rank 1 cannot write, too."""
    whole, parts = (torch.load(two_ranks / f"{kind}-{stage}.pt") for kind in ("whole", "parts"))
    assert_same(root, f"whole-{stage}", f"parts-{stage}", whole, parts)


@pytest.mark.slow
def test_one_rank_of_two_cannot_write(two_ranks):
    """Rank 1 hits its limit on file sizes: both ranks end with the same message."""
    messages = json.loads((two_ranks / "messages.json").read_text())
    assert messages[0] == messages[1] and "step-00000002" in messages[0]
    assert "step 3 could not be saved: rank 1: [Errno 27] File too large" in messages[0]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(root, world):
    """kill -9 while a checkpoint is being written: LATEST still names a whole one, and nothing else is lost."""
    flags = ["backtrack.loop.save_every=1", "backtrack.loop.sample_every=0"]
    whole = support.backtrack_weights(support.single(root, "unkilled", world, *flags))
    call = [sys.executable, "-m", "trainer.backtrack", "--config", str(support.TINY)]
    call += [*support.places(root, "killed"), *flags]
    checkpoints = root / "killed" / "backtrack" / "checkpoints"
    process = subprocess.Popen(call, env=support.environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    begun = None  # the second save, or a later one if this process was not given the time to see it
    while process.poll() is None and not begun:
        begun = next(checkpoints.glob("step-0000000[2-8].tmp/engines"), None)
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert begun, "no save was seen"
    half, step = begun.parent, int(begun.parent.stem[5:])
    latest = (root / "killed" / "backtrack" / "LATEST").read_text().strip()
    assert int(latest[5:]) >= step - 1 and (checkpoints / latest).is_dir()
    assert not half.exists() or latest == f"step-{step - 1:08d}"  # renamed, it may not yet be named
    weights = support.backtrack_weights(support.single(root, "killed", world, *flags))
    assert_same(root, "unkilled", "killed", whole, weights)
    assert not half.exists()


@pytest.mark.slow
def test_signal_to_the_command_exits_75_and_resumes(root):
    """The real command: SIGTERM, exit code 75, the same command again, exit code 0."""
    flags = [
        *support.places(root, "signalled"),
        "backtrack.loop.sample_every=0",
        "backtrack.loop.save_every=1000",
        "backtrack.steps=2000",
    ]
    call = [sys.executable, "-m", "trainer.backtrack", "--config", str(support.TINY)]
    process = subprocess.Popen([*call, *flags], env=support.environment(), stderr=subprocess.PIPE, text=True)
    lines = root / "signalled" / "backtrack" / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and lines.read_text().count("\n") > 1):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 75, message
    latest = (root / "signalled" / "backtrack" / "LATEST").read_text().strip()
    step = int(latest[5:])
    flags[-1] = f"backtrack.steps={step + 2}"
    done = support.call("backtrack", *call[3:], *flags)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {root}/signalled/backtrack/checkpoints/{latest}" in done.stderr
    assert (root / "signalled" / "generator" / "model_index.json").exists()


def test_a_checkpoint_of_another_run_is_refused(root, world):
    run = support.single(root, "identity", world)
    assert support.backtrack_weights(run, signal_at=(2,)) is None
    other = support.single(root, "identity", world, "backtrack.guidance_scale=2.0")
    with pytest.raises(UserError, match=r"backtrack.guidance_scale was 1.25, is now 2.0"):
        support.backtrack_weights(other)
    longer = support.single(root, "identity", world, "backtrack.steps=10")
    assert support.backtrack_weights(longer) is not None


def test_a_damaged_checkpoint_is_refused(root, world):
    run = support.single(root, "damaged-checkpoint", world)
    assert support.backtrack_weights(run, signal_at=(2,)) is None
    file = next((run.folder / "backtrack" / "checkpoints" / "step-00000002").rglob("*model_states.pt"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"step-00000002 is damaged \(.*model_states.pt.*no older intact one"):
        support.backtrack_weights(support.single(root, "damaged-checkpoint", world))


def test_fresh_refuses_a_folder_with_a_checkpoint(root, world):
    run = support.single(root, "fresh", world)
    assert support.backtrack_weights(run, signal_at=(2,)) is None
    with pytest.raises(UserError, match="--fresh"):
        type(run)(run.settings, world, fresh=True).stage_folder("backtrack")
