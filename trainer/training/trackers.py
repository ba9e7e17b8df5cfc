"""Experiment trackers of a stage: TensorBoard and, through accelerate, W&B, MLflow, Comet and SwanLab.

Only rank 0 has any. A tracker is an extra: metrics.jsonl and samples/ hold everything, so one that fails or hangs is
dropped.
They are started and closed by the training thread, since some set signal handlers; a thread of MetricsWriter logs to them.
"""

import importlib.util
import json
import os
import struct
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from accelerate import PartialState
from accelerate.tracking import CometMLTracker, GeneralTracker, MLflowTracker, SwanLabTracker, WandBTracker

from trainer.checkpoint.files import write_text
from trainer.distributed.logs import log
from trainer.errors import UserError

PROJECT = "disback"
RUN_IDS = "trackers.json"  # in the stage's folder: tracker -> id of the run that every restart continues
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml", "swanlab": "swanlab"}
FINISH_SECONDS = 60.0  # W&B's upload at the end of a stage; a preempted job has little more before it is killed
HANG_SECONDS = 120.0  # for one call of a tracker, when a save waits for it; MLflow's own patience is 60 s
# accelerate takes these as a sign that it should join a process group and choose a device.
LAUNCHER_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError if the package of a tracker (`loop.trackers`) is not installed."""
    for name in names:
        package = PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"loop.trackers: {package} is not installed: pip install {package}")


def act_alone() -> None:
    """Makes accelerate, which its trackers ask for their rank, take this process for a single one on a CPU: under torchrun
    its state would otherwise set the device and environment variables, and might join a process group."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    try:
        PartialState(cpu=True)
    finally:
        os.environ.update(hidden)


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """Nested sections as dotted keys."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class Tracker(Protocol):
    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, step: int, file: Path) -> None:
        """file: a grid of samples as a PNG."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in tensorboard/. After a resume TensorBoard hides what came after the resumed step `first`."""

    def __init__(self, folder: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=first + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def image(self, step: int, file: Path) -> None:
        """With the bytes of the file: `add_image` would compress the pixels once more."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = file.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # of the PNG's header
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="samples", image=image)]), step)

    def close(self) -> None:
        self.writer.close()


class AccelerateTracker(ABC):
    """One run in a tracker of accelerate. id: of the run; a restart passes it as `known` to continue the same run."""

    def __init__(self, folder: Path, known: str | None, config: dict):
        """folder: of the stage, in the run's folder. config: logged when the run is new."""
        self.folder, self.known = folder, known
        self.group = folder.resolve().parent.name
        self.name = f"{self.group}/{folder.name}"
        self.id = known or uuid.uuid4().hex
        act_alone()
        self.tracker = self.make()
        self.tracker.start()
        if known is None:
            self.describe(config)

    @abstractmethod
    def make(self) -> GeneralTracker:
        """The library's tracker of this run, not started."""

    def describe(self, config: dict) -> None:
        self.tracker.store_init_configuration(config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.tracker.log(values, step=step)

    def image(self, step: int, file: Path) -> None:
        self.tracker.log_images({"samples": [str(file)]}, step=step)

    def close(self) -> None:
        self.tracker.finish()


class Wandb(AccelerateTracker):
    """Its step is the training step. A step only ever rises in W&B: of the steps that a restart repeats, those that the
    server has already keep their first values."""

    def make(self) -> GeneralTracker:
        # Its reports of its own crashes would go over the network in offline mode, too.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        about = {"id": self.id, "resume": "allow", "name": self.name, "group": self.group, "dir": str(self.folder)}
        return WandBTracker(PROJECT, **about, settings={"finish_timeout": FINISH_SECONDS})

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step >= self.tracker.run.starting_step:  # W&B would warn about each and ignore it
            super().scalars(step, values)

    def image(self, step: int, file: Path) -> None:
        if step >= self.tracker.run.starting_step:
            super().image(step, file)


class MLflow(AccelerateTracker):
    """MLflow chooses the id. Values of repeated steps are kept beside the first ones. Its active run is that of one thread: in
    another, calls must name the run, or they would begin a new one."""

    def make(self) -> GeneralTracker:
        # Each call waits for the server. By default a silent one is asked for many minutes, and all ranks wait for rank 0.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        return MLflowTracker(PROJECT, run_id=self.known, run_name=self.name)

    def describe(self, config: dict) -> None:
        self.id = self.tracker.tracker.info.run_id
        super().describe(flatten(config))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.tracker.log(values, step=step, run_id=self.id)

    def image(self, step: int, file: Path) -> None:
        import mlflow

        mlflow.log_artifact(str(file), "samples", run_id=self.id)


class Comet(AccelerateTracker):
    def make(self) -> GeneralTracker:
        return CometMLTracker(PROJECT, experiment_key=self.id)  # comet_ml continues an experiment that exists

    def describe(self, config: dict) -> None:
        self.tracker.tracker.set_name(self.name)
        super().describe(flatten(config))

    def image(self, step: int, file: Path) -> None:
        self.tracker.tracker.log_image(str(file), name="samples", step=step)


class SwanLab(AccelerateTracker):
    """It ignores values of a step that it has already."""

    def make(self) -> GeneralTracker:
        about = {"experiment_name": self.name, "logdir": str(self.folder / "swanlog")}
        self.id = self.id[:21]  # its first versions that resume want exactly 21 characters
        return SwanLabTracker(PROJECT, id=self.id, resume="allow", **about)


SERVICES = {"wandb": Wandb, "mlflow": MLflow, "comet": Comet, "swanlab": SwanLab}


class Trackers:
    """The trackers of a stage, on rank 0. None of them ends training: one that fails or hangs is dropped, with one
    warning."""

    def __init__(self, names: Sequence[str], folder: Path, first: int, config: dict):
        """names: `loop.trackers`. folder: of the stage. first: the resumed step. config: of the run, logged once."""
        self.open: dict[str, Tracker] = {}
        self._busy: str | None = None  # the tracker that is being called
        self._dropped: set[str] = set()
        for name in dict.fromkeys(names):
            with self._dropped_if_it_fails(name):
                self.open[name] = TensorBoard(folder, first) if name == "tensorboard" else _start(name, folder, config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, tracker in list(self.open.items()):
            with self._dropped_if_it_fails(name):
                tracker.scalars(step, values)

    def image(self, step: int, file: Path) -> None:
        """file: a grid of samples as a PNG."""
        for name, tracker in list(self.open.items()):
            with self._dropped_if_it_fails(name):
                tracker.image(step, file)

    def close(self) -> None:
        for name, tracker in list(self.open.items()):
            with self._dropped_if_it_fails(name):
                tracker.close()
        self.open.clear()

    def drop_hanging(self) -> bool:
        """Drops the tracker whose call does not return; False if none is being called. What the call had for the trackers
        after it is lost."""
        name = self._busy
        if name:
            self._drop(name, f"it has not answered for {HANG_SECONDS:g} s")
        return bool(name)

    @contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        self._busy = name
        try:
            yield
        except Exception as error:  # of any type: the packages raise their own, and OSError
            self._drop(name, " ".join(f"{type(error).__name__}: {error}".split()))
        finally:
            if self._busy == name:  # not after it was dropped, when another thread is busy
                self._busy = None

    def _drop(self, name: str, reason: str) -> None:
        self.open.pop(name, None)
        if name in self._dropped:
            return
        self._dropped.add(name)
        log.warning(
            f"{name} failed and gets nothing more until the next restart ({reason}); training goes on, and "
            "metrics.jsonl and samples/ have everything"
        )


def _start(name: str, folder: Path, config: dict) -> AccelerateTracker:
    """Starts a new run, or continues the one of an earlier process."""
    file = folder / RUN_IDS
    ids = json.loads(file.read_text()) if file.exists() else {}
    tracker = SERVICES[name](folder, ids.get(name), config)
    if name not in ids:
        write_text(json.dumps(ids | {name: tracker.id}) + "\n", file)
    return tracker
