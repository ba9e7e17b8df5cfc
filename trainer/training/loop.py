"""The one training loop. Pretraining, recording and backtracking all run through `train`."""

import time
from pathlib import Path

from data.rejects import reasons
from trainer.checkpoint.save_load import Checkpoints
from trainer.config.schema import HealthSettings, LoopSettings
from trainer.distributed.logs import log, take_warnings
from trainer.distributed.signals import StopRequest
from trainer.distributed.world import World
from trainer.errors import Stopped, UserError
from trainer.training.health import Health
from trainer.training.metrics import MetricsWriter
from trainer.training.progress import Progress
from trainer.training.stage import Stage
from trainer.training.trackers import check_trackers


def train(stage: Stage, settings: LoopSettings, health: HealthSettings, folder: Path, world: World) -> float:
    """Runs a stage to its end, from its last checkpoint if there is one; returns the seconds of training so far.

    Raises Stopped after saving if a signal asked for it, UserError if updates no longer succeed or a tracker's package is
    missing.
    """
    progress = Progress(folder, stage.name, stage.steps, settings.log_every, world.main)
    try:
        check_trackers(settings.trackers)
        loop = Loop(stage, settings, health, folder, world, progress)
        try:
            loop.run()
        finally:
            loop.metrics.close()
        progress.end("finished", warnings=take_warnings())
    except Stopped as stop:
        progress.end("stopped", str(stop), take_warnings())
        raise
    except BaseException as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        progress.end("failed", text, take_warnings())
        raise
    finally:
        stage.close()
    return loop.clock.seconds


class Stopwatch:
    """Seconds and device-hours of training over all resumptions, without saving. A process has one device."""

    def __init__(self, step: int, seconds: float, gpu_hours: float, processes: int):
        self.step, self.seconds, self.gpu_hours, self.processes = step, seconds, gpu_hours, processes
        self._mark = time.monotonic()

    def lap(self, step: int) -> float | None:
        """Seconds per step since the last lap; None if there was no step."""
        if step == self.step:
            return None
        spent, steps = time.monotonic() - self._mark, step - self.step
        self.seconds += spent
        self.gpu_hours += spent * self.processes / 3600
        self.restart(step)
        return spent / steps

    def restart(self, step: int) -> None:
        """Forgets the time since the last lap."""
        self._mark, self.step = time.monotonic(), step


class Loop:
    """Steps, metrics lines, previews, checkpoints and stopping, for any stage. Its construction resumes the stage."""

    def __init__(
        self,
        stage: Stage,
        settings: LoopSettings,
        health: HealthSettings,
        folder: Path,
        world: World,
        progress: Progress,
    ):
        self.stage, self.settings, self.world, self.progress = stage, settings, world, progress
        self.checkpoints = Checkpoints(folder, world, stage.roles, stage.identity, stage.split, settings)
        self.health = Health(health, stage.split)
        self.first, seconds, gpu_hours = 0, 0.0, 0.0
        if resumed := self.checkpoints.load(stage.regroup):
            self.first, state = resumed
            stage.load_state_dict(state["stage"])
            self.health.load_state_dict(state["health"])
            seconds = state["seconds"]
            # Checkpoints of earlier versions do not have it: as if there had always been this many processes.
            gpu_hours = state.get("gpu_hours", seconds * world.size / 3600)
        self.clock = Stopwatch(self.first, seconds, gpu_hours, world.size)
        self.saving: float | None = None  # seconds of the saves since the last metrics line
        config = stage.run.settings.model_dump(mode="json")
        self.metrics = MetricsWriter(folder, world, stage.name, stage.steps, self.first, settings.trackers, config)
        progress.begin(self.first if resumed else None)

    def run(self) -> None:
        stage, settings = self.stage, self.settings
        if not self.over(self.first):
            stage.begin(self.first)
            if self.first == 0 and settings.sample_every:
                self.preview(0)
        self.clock.restart(self.first)
        with StopRequest(self.world) as stop:
            step = self.first
            while not self.over(step):
                step += 1
                steps_to_line = min(-step % settings.log_every, stage.steps - step)
                stage.keep_norms(0 if stage.may_end(step) else steps_to_line)
                stage.update(step - 1)
                last = self.over(step)
                if steps_to_line == 0 or last:
                    self.log_line(step)
                elif stage.announces(step - 1):
                    self.metrics.line(step, self.position(step) | stage.host_values(step - 1))
                if settings.sample_every and (last or step % settings.sample_every == 0):
                    self.preview(step)
                stopping = stop.agreed() and not last
                if last or stopping or step % settings.save_every == 0:
                    path = self.save(step)
                if stopping:
                    log.info(f"{stage.name}: stopped by a signal; saved {path}; run the same command again to resume")
                    raise Stopped(f"{stage.name} stopped at step {step} of {stage.steps}; saved {path}")

    def over(self, step: int) -> bool:
        """Whether nothing is left to train after `step` steps; the same on every rank."""
        return step >= self.stage.steps or self.stage.ended

    def log_line(self, step: int) -> None:
        """A complete metrics line: the one place where the loop waits for the device. Then the health checks."""
        stage = self.stage
        values = stage.host_values(step - 1) | stage.device_values()
        pace = self.clock.lap(step)  # of finished work, since values of the device are known
        line = self.position(step) | values | {"save_seconds": self.saving}
        line |= {"step_seconds": pace, "images_per_second": stage.batch / pace}
        line["tflops_per_gpu"] = stage.flops / pace / 1e12 if stage.flops else None
        self.saving = None
        self.metrics.line(step, line)
        if self.over(step) and line["skipped"]:
            log.info(f"{stage.name}: skipped samples by reason: {reasons(line['skipped'])}")
        for warning in self.health.observe(line):
            log.warning(f"{stage.name}, step {step}: {warning}")
        self.progress.line(step, line, take_warnings())
        if self.health.hopeless:
            raise UserError(
                f"{stage.name} stopped at step {step}: the gradients of {self.health.skipped_in_a_row} updates in a row were "
                f"not finite; the last checkpoint is {self.checkpoints.latest() or 'none'}. Lower the learning rates, clip "
                "harder or check the data, then run the same command again"
            )

    def position(self, step: int) -> dict:
        stage = self.stage
        spent = {"time": self.clock.seconds, "compute": stage.compute(step), "gpu_hours": self.clock.gpu_hours}
        return {"images_seen": step * stage.batch, "epoch": stage.epoch(step)} | spent

    def preview(self, step: int) -> None:
        grid = self.stage.preview()
        if grid is not None:
            self.metrics.image(step, grid)

    def save(self, step: int) -> Path:
        self.clock.lap(step)
        began, stage = time.monotonic(), self.stage
        state = {"stage": stage.state_dict(), "health": self.health.state_dict()}
        state |= {"seconds": self.clock.seconds, "gpu_hours": self.clock.gpu_hours}
        path = self.checkpoints.save(step, state, stage.snapshots(), stage.needs)
        self.metrics.join()  # a grid of this step was compressed meanwhile
        stage.after_save(self.checkpoints.needed())
        self.progress.saved(step)
        self.saving = (self.saving or 0.0) + time.monotonic() - began
        self.clock.restart(step)
        return path
