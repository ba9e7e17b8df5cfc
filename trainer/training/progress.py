"""`status.json` in a stage's folder: how far training is, for `disback status`. No torch: login nodes read it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from trainer.checkpoint.files import write_text
from trainer.distributed.logs import log

FILE = "status.json"
WARNINGS_KEPT = 50
NEW = {
    "step": 0,
    "step_seconds": None,
    "images_per_second": None,
    "target_node": None,
    "images_seen": None,
    "epoch": None,
    "saved_step": None,
    "saved": None,
    "restarts": 0,
    "warnings": [],
    "warning_count": 0,
}


class Progress:
    """Writes a stage's `status.json`. Only the main rank writes; every rank may call.

    Each write replaces the file atomically. A write that fails, as on a full disk, never ends the training. Keys:

        stage, steps, log_every                           as configured
        state                                             "running", "finished", "stopped" (on a signal) or "failed"
        message                                           why it stopped or failed
        step                                              last step that was logged or saved
        step_seconds, images_per_second, target_node      of the last metrics line; null before the first
        images_seen, epoch                                position in the data, the same on every rank, at that line; a
                                                          stream has no epoch
        saved_step, saved                                 last checkpoint and its time; null before the first
        started, updated                                  times of this start and of the last write
        restarts                                          how often the stage resumed from a checkpoint
        warnings, warning_count                           the last 50 warnings in the log, and how many there were

    Times are seconds since the epoch. A resumed run goes on with the warnings, restarts and speed in the file.
    """

    def __init__(self, folder: Path, stage: str, steps: int, log_every: int, main: bool):
        self.file, self.main, self.failing = folder / FILE, main, False
        self.before = Progress.read(folder) or {}
        about = {"stage": stage, "state": "running", "message": "", "steps": steps, "log_every": log_every}
        # What an earlier start wrote stays, in case that this one fails before it begins.
        self.values = NEW | self.before | about | {"started": time.time()}

    def begin(self, resumed_at: int | None) -> None:
        """Training starts. resumed_at: the step of the checkpoint that the stage resumed from; None for a new start."""
        if resumed_at is None:
            self.values |= NEW
        else:
            restarts = self.values["restarts"] + bool(self.before)
            self.values |= {"step": resumed_at, "saved_step": resumed_at, "restarts": restarts}
        self._write({})

    @staticmethod
    def read(folder: Path) -> dict | None:
        """What a stage's `status.json` says; None if there is none, as in runs of earlier versions."""
        try:
            return json.loads((folder / FILE).read_text())
        except (OSError, ValueError):
            return None

    def line(self, step: int, record: dict, warnings: Sequence[str] = ()) -> None:
        """Takes step and speed from a metrics line of a logging interval, and the warnings since the last one."""
        shown = ("step_seconds", "images_per_second", "target_node", "images_seen", "epoch")
        self._write({"step": step} | {key: record.get(key) for key in shown}, warnings)

    def saved(self, step: int) -> None:
        """The checkpoint of a step is safe on disk."""
        self._write({"step": step, "saved_step": step, "saved": time.time()})

    def end(
        self, state: Literal["finished", "stopped", "failed"], message: str = "", warnings: Sequence[str] = ()
    ) -> None:
        self._write({"state": state, "message": message}, warnings)

    def _write(self, values: dict, warnings: Sequence[str] = ()) -> None:
        if not self.main:
            return
        self.values |= values | {"updated": time.time()}
        self.values["warnings"] = [*self.values["warnings"], *warnings][-WARNINGS_KEPT:]
        self.values["warning_count"] += len(warnings)
        try:
            write_text(json.dumps(self.values, indent=2) + "\n", self.file, durable=False)
            self.failing = False
        except OSError as error:
            if not self.failing:
                log.warning(f"{self.file} cannot be written ({error}); `disback status` shows old values until it can")
            self.failing = True
