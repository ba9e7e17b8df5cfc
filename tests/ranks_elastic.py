"""Scenarios of checkpoints that another number of processes continues, or that one rank cannot write; ranks.py runs them."""

import os
import resource
import signal

import support

from trainer.errors import Stopped, UserError
from trainer.pretrain import Pretraining
from trainer.record import Recording, record
from trainer.training.loop import train
from trainer.training.run import Run


def elastic_flags(root, stage):
    """Overrides of the runs that change their number of processes: momentum, and samples that are used again."""
    folder = root / "elastic-stages"
    folder.mkdir(exist_ok=True)
    stage = support.sharded_zero3(folder) if stage == "sharded" else stage
    betas = [f"backtrack.{role}.betas=[0.9, 0.999]" for role in ("generator", "fake_score")]
    loop = (
        "backtrack.reuse_x0=true",
        "backtrack.loop.log_every=4",
        "backtrack.loop.keep_last=9",
    )
    return [*support.PARITY, *loop, *betas, *support.zero(stage)]


class ReadingRun(Run):
    """Writes down the positions that this rank reads."""

    def dataset(self, split, want, batch=1):
        return ReadingDataset(
            super().dataset(split, want, batch), self.folder / f"read-{self.world.size}-{self.world.rank}.txt"
        )


class ReadingDataset:
    def __init__(self, dataset, file):
        self.dataset, self.file = dataset, file

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, position):
        with self.file.open("a") as handle:
            handle.write(f"{position}\n")
        return self.dataset[position]


def elastic_run(root, name, world, stage, *flags):
    flags = (*elastic_flags(root, stage), *flags)
    kind = ReadingRun if name == "chain-zero2" else Run
    return kind(support.tiny(root, name, *flags), world)


def stop_training(root, name, world, stage, at, *flags):
    """Backtracking up to step `at`: ranks that agree on a signal stop a step later, one process at once."""
    run = elastic_run(root, name, world, stage, *flags)
    assert support.backtrack_weights(run, signal_at=(at if world.size == 1 else at - 1,)) is None
    assert (run.folder / "backtrack" / "LATEST").read_text() == f"step-{at:08d}\n"
    return run


class Signalled:
    """A stage that is sent a signal in the middle of a step."""

    stop_at = 0

    def update(self, step):
        if step + 1 == self.stop_at and self.world.main:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().update(step)


class SignalledRecording(Signalled, Recording):
    pass


class SignalledPretraining(Signalled, Pretraining):
    pass


def _stop(stage, at):
    """Runs a stage up to step `at`, where it must stop."""
    run, world = stage.run, stage.world
    stage.stop_at = at if world.size == 1 else at - 1
    try:
        train(stage, stage.settings.loop, run.settings.health, run.stage_folder(stage.name), world)
    except Stopped:
        return
    raise AssertionError("it was not stopped")


def stop_recording(root, name, world, flags, at):
    run = Run(support.tiny(root, name, *flags), world)
    run.stage_folder("record")
    _stop(SignalledRecording(run), at)


def recording_flags(root, name):
    """The probe has 7 samples, which two ranks cannot share evenly."""
    more = ("record.probe=7", "record.loop.sample_every=8", f"path={root / 'elastic-paths' / name}")
    return (*support.RECORDING, *more)


def pretraining(root, name, world):
    start = root / "base" / "pipeline"
    flags = (f"pretrain.start={start}", "pretrain.ema=0.5", "pretrain.optimizer={lr: 1e-3, eps: 1e-4}")
    run = Run(support.tiny(root, name, *flags), world)
    run.stage_folder("pretrain")
    return SignalledPretraining(run, start)


def elastic_save(root, world):
    """Saves by two ranks in the middle of everything."""
    for stage in support.STAGES:
        stop_training(root, f"chain-{stage}", world, stage, 3)
    stop_training(root, "two-bf16", world, "sharded", 3, "precision=bf16")
    stop_recording(root, "recording-parts", world, recording_flags(root, "parts"), 3)
    _stop(pretraining(root, "pretraining-parts", world), 5)


def elastic_load(root, world):
    """Goes on, with two ranks, with what one process saved."""
    for stage in support.STAGES:
        run = elastic_run(root, f"chain-{stage}", world, stage)
        support.save(support.backtrack_weights(run), root / "elastic_load" / f"{stage}.pt", world)
    sharded = support.sharded_zero3(root / "elastic_load")
    flags = (f"record.ds_config={sharded}", f"record.teacher_ds_config={sharded}")
    record(Run(support.tiny(root, "recording-parts", *recording_flags(root, "parts"), *flags), world))


class CannotWrite(support.Interrupted):
    """One rank may write no file of more than 100 kB from a step on."""

    step_limit = rank_limit = 0

    def update(self, step):
        if step + 1 == self.step_limit and self.world.rank == self.rank_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return super().update(step)


def write_failure(run, step, rank):
    """Backtracking whose save at `step` one rank cannot write; returns this rank's error message."""
    try:
        support.backtrack_weights(run, CannotWrite, step_limit=step, rank_limit=rank)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    raise AssertionError("the save did not fail")
