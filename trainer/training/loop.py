"""The one training loop: pretraining, recording and backtracking run through `train`."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from data.sampling_order import Split
from trainer.checkpoint.checkpoint import Checkpoints
from trainer.config.schema import HealthSettings, LoopSettings
from trainer.distributed.logs import log
from trainer.distributed.signals import StopRequest
from trainer.distributed.world import World
from trainer.engine.role import Role, skipped_updates
from trainer.errors import Stopped, UserError
from trainer.training.health import Health
from trainer.training.metrics import Meters, Telemetry


class Stage(Protocol):
    """What a stage adds to the loop."""

    name: str
    steps: int
    batch: int  # samples a step, over all ranks
    flops: float  # counted FLOP a step and rank; 0 if unknown
    roles: dict[str, Role]
    identity: dict  # what a resumed run must have in common with the saved one
    split: Split  # how a step's batch is cut into ranks and micro-steps; a resumed run may cut it otherwise
    needs: Sequence[str]  # files outside of a checkpoint, written so far, that going back to this step needs

    def begin(self, step: int) -> None:
        """Opens the data at a step; called once, after a resume."""

    def update(self, step: int, meters: Meters, until_log: int) -> dict | None:
        """One training step; until_log: steps from this one to the next that is logged, 0 for one that is (norms are
        read then, which waits for the device). Returns values that must be written now (a target switch), or None."""

    def metrics(self) -> dict:
        """Values of the current step for the metrics line (learning rates, target node, skipped samples)."""

    def preview(self) -> Tensor | None:
        """A uint8 grid [3, H, W] of samples. Every rank calls it."""

    def weights_writer(self) -> Callable[[Path], None] | None:
        """Writes the weights that an evaluation reads as a weights folder. Every rank calls it."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def regroup(self, states: list[dict], saved: Split) -> dict:
        """The state to load on this rank, from those of all ranks of a run that was cut otherwise. The engines are
        loaded already."""

    def saved(self, needed: set[str]) -> None:
        """Called when a checkpoint is safe on disk. needed: the `needs` of all that are kept (rank 0)."""

    def close(self) -> None: ...


def train(stage: Stage, settings: LoopSettings, health_settings: HealthSettings, folder: Path, world: World) -> float:
    """Runs a stage to its end, from its last checkpoint if there is one; returns the seconds of training so far.

    Raises Stopped after saving if a signal asked for it, UserError if no update can be made any more.
    """
    checkpoints = Checkpoints(folder, world, stage.roles, stage.identity, stage.split, settings)
    first, seconds, meters = 0, 0.0, Meters()
    if resumed := checkpoints.load(stage.regroup):
        first, state = resumed
        stage.load_state_dict(state["stage"])
        meters.load_state_dict(state["meters"])
        seconds = state["seconds"]
    telemetry = Telemetry(folder, world, stage.name, stage.steps, first, settings.tensorboard)
    if first < stage.steps:
        stage.begin(first)
        if first == 0 and settings.sample_every:
            _preview(stage, telemetry, 0)
    health = Health(health_settings, skipped_updates(stage.roles))
    mark, marked = time.monotonic(), first

    saving = None  # seconds of the saves since the last line

    def save(step: int) -> Path:
        nonlocal saving
        began = time.monotonic()
        state = {"stage": stage.state_dict(), "meters": meters.state_dict(), "seconds": seconds}
        path = checkpoints.save(step, state, stage.weights_writer(), stage.needs)
        stage.saved(checkpoints.shelf.needed() if world.main else set())
        saving = (saving or 0.0) + time.monotonic() - began
        return path

    try:
        with StopRequest(world) as stop:
            for step in range(first + 1, stage.steps + 1):
                last = step == stage.steps
                until_log = min(-step % settings.log_every, stage.steps - step)
                logging = until_log == 0
                switch = stage.update(step - 1, meters, until_log)
                if logging:
                    values = meters.read(world)  # waits for the device: the timing below is of finished work
                    spent, mark = time.monotonic() - mark, time.monotonic()
                    seconds += spent
                    pace, marked = spent / (step - marked), step
                    line = _speed(stage, step, seconds, pace) | values | stage.metrics() | {"save_seconds": saving}
                    saving = None
                    telemetry.line(step, line)
                    _look_after(health, line, stage, step, checkpoints)
                elif switch:
                    telemetry.line(step, {"images_seen": step * stage.batch, "time": seconds} | switch)
                if settings.sample_every and (last or step % settings.sample_every == 0):
                    _preview(stage, telemetry, step)
                stopping = stop.agreed() and not last
                if last or stopping or step % settings.save_every == 0:
                    seconds += time.monotonic() - mark if step != marked else 0.0
                    path = save(step)
                    mark, marked = time.monotonic(), step
                if stopping:
                    log.info(f"{stage.name}: stopped by a signal; saved {path}; run the same command again to go on")
                    raise Stopped(f"{stage.name} stopped at step {step} of {stage.steps}; saved {path}")
    finally:
        stage.close()
        telemetry.close()
    return seconds


def _look_after(health: Health, line: dict, stage: Stage, step: int, checkpoints: Checkpoints) -> None:
    """Says what looks wrong; ends a run that only leaves updates out (every rank finds the same)."""
    for warning in health.observe(line):
        log.warning(f"{stage.name}, step {step}: {warning}")
    if health.hopeless:
        good = checkpoints.latest()
        raise UserError(
            f"{stage.name} stopped at step {step}: {health.skipped_in_a_row} updates in a row had a gradient that was not "
            f"finite; the last checkpoint is {good or 'none'}. Lower the learning rates, clip harder or look at the data, "
            "then run the same command again"
        )


def _speed(stage: Stage, step: int, seconds: float, pace: float) -> dict:
    return {
        "images_seen": step * stage.batch,
        "time": seconds,
        "step_seconds": pace,
        "images_per_second": stage.batch / pace,
        "tflops_per_gpu": stage.flops / pace / 1e12 if stage.flops else None,
    }


def _preview(stage: Stage, telemetry: Telemetry, step: int) -> None:
    grid = stage.preview()
    if grid is not None:
        telemetry.image(step, grid)
