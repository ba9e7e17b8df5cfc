"""The checkpoints of a stage on disk: their names, which of them are complete, and which are deleted.

This is the one module that knows LATEST, step names and the layout of `checkpoints/`. It imports no torch, so that
`disback status` can use it on login nodes.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from trainer.checkpoint.files import MARGIN, file_sizes, free_bytes, sync_folder, write_text
from trainer.config.schema import LoopSettings
from trainer.distributed.logs import log
from trainer.errors import UserError

FORMAT = 4
READABLE = (
    3,
    FORMAT,
)  # in 3, weight averages are of the network's own weights, and in equal slices at every ZeRO stage
WEIGHTS = "weights"  # inside a checkpoint: the weights for evaluation, as a plain denoiser folder or a LoRA folder
RAW = "weights-raw"  # the same before averaging, if the run saves them
ABOUT = "state.json"  # inside a checkpoint: step, split, file sizes; a folder without it is not a complete checkpoint


def step_name(step: int) -> str:
    """The name of a checkpoint, a sample grid, a candidate node or an evaluation made at a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a name made by `step_name`; None for any other name."""
    match = re.fullmatch(r"step-(\d{8,})", name)
    return int(match[1]) if match else None


def by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """The entries of a folder that are named after a step (step-00000500, or step-00000500.png), in order of steps."""
    found = {step_of(path.name.removesuffix(suffix)): path for path in folder.glob(f"step-*{suffix}")}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


class CheckpointDirectory:
    """`checkpoints/` and LATEST in a stage's folder. Anybody may read; only rank 0 of a training run writes."""

    def __init__(self, folder: Path, retention: LoopSettings | None = None):
        """folder: the stage's, such as RUN/backtrack. retention: which older checkpoints to keep; None to read only."""
        self.folder, self.retention = folder, retention
        self.root = folder / "checkpoints"
        self.latest_file = folder / "LATEST"

    def place(self, step: int) -> Path:
        """The folder for the checkpoint of a step."""
        return self.root / step_name(step)

    def latest(self) -> str | None:
        """The name of the checkpoint that a run resumes from; None if there is none yet. "" if LATEST is gone, or has lost its
        content, as on a full disk or after a power failure: with checkpoints there, training must not start over."""
        name = self._latest_text()
        if step_of(name) is not None:
            return name
        return "" if self.complete() else None

    def _latest_text(self) -> str:
        try:
            return self.latest_file.read_text(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def latest_step(self) -> int | None:
        return step_of(self.latest() or "")

    def weights(self, name: str, kind: str = WEIGHTS) -> Path:
        """The weights folder for evaluation of a checkpoint, whether or not it exists. kind: WEIGHTS or RAW."""
        return self.root / name / kind

    def latest_weights(self) -> Path:
        """The weights folder of the latest checkpoint. Raises UserError if there is no checkpoint."""
        if name := self.latest():
            return self.weights(name)
        if name == "":
            raise UserError(self._lost_latest())
        raise UserError(f"{self.folder} has no checkpoint yet: run `disback {self.folder.name}` first")

    def with_weights(self, kind: str = WEIGHTS) -> list[str]:
        """Names of the checkpoints that have a weights folder, oldest first."""
        return [path.name for path in by_step(self.root).values() if (path / kind).is_dir()]

    def complete(self, until: int | None = None) -> list[int]:
        """Steps that have a complete checkpoint, in order; `until` is the last one of interest."""
        steps = [step for step, path in by_step(self.root).items() if (path / ABOUT).exists()]
        return [step for step in steps if until is None or step <= until]

    def about(self, step: int) -> dict:
        return json.loads((self.place(step) / ABOUT).read_text())

    def size(self, step: int) -> int:
        """Bytes of a checkpoint."""
        return sum(self.about(step)["files"].values())

    def needed(self) -> set[str]:
        """Files outside the checkpoints that resuming from any of the complete ones would need."""
        return {name for step in self.complete() for name in self.about(step)["needs"]}

    def publish(self, step: int, temporary: Path, about: dict) -> None:
        """Renames a finished temporary folder to the checkpoint of a step, points LATEST at it, deletes old ones."""
        about = {"format": FORMAT, "step": step, **about, "files": file_sizes(temporary)}
        write_text(json.dumps(about, indent=2) + "\n", temporary / ABOUT)
        shutil.rmtree(self.place(step), ignore_errors=True)  # of a run that was set back, or killed before LATEST
        os.replace(temporary, self.place(step))
        sync_folder(self.root)
        write_text(step_name(step) + "\n", self.latest_file)
        self._prune(self.complete(step)[: -self.retention.keep_last])

    def remove_unfinished(self) -> None:
        """Deletes what killed saves left, of whatever step: a resumed run may never save that step again."""
        for folder in self.root.glob("*.tmp"):
            shutil.rmtree(folder, ignore_errors=True)

    def discard(self, *folders: Path) -> None:
        """Deletes the folders of an unfinished save, but never the checkpoint that LATEST names."""
        for folder in folders:
            if folder.name != self.latest():
                shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, steps: list[int]) -> None:
        """Deletes these checkpoints, except every `keep_every`-th step; every `keep_weights_every`-th keeps its weights."""
        every, weights = self.retention.keep_every, self.retention.keep_weights_every
        for step in steps:
            if every and step % every == 0:
                continue
            folder = self.place(step)
            (folder / ABOUT).unlink()  # first: a half-deleted checkpoint must not count as complete
            if weights and step % weights == 0:
                for part in folder.iterdir():
                    if part.name not in (WEIGHTS, RAW):
                        shutil.rmtree(part) if part.is_dir() else part.unlink()
            else:
                shutil.rmtree(folder)

    def make_room(self, step: int, first_size: int) -> None:
        """Raises OSError if the checkpoint of a step will not fit on the disk.

        Its size is estimated as that of the previous one, or `first_size` bytes for the first. When space is short, the
        checkpoints that this save would delete afterwards are deleted before it, but never the one that LATEST names.
        """
        before = self.complete(step)
        needed = int((self.size(before[-1]) if before else first_size) * MARGIN)
        if free_bytes(self.root) < needed and (older := before[: -max(self.retention.keep_last - 1, 1)]):
            log.warning(f"{self.root}: short of space: deleting older checkpoints before the save instead of after it")
            self._prune(older)
        if (free := free_bytes(self.root)) < needed:
            raise OSError(
                f"it takes about {needed / 1e9:.3g} GB and {self.root} has {free / 1e9:.3g} GB free; nothing was written "
                f"(loop.keep_last is {self.retention.keep_last})"
            )

    def examine(self, name: str) -> tuple[dict | None, str | None]:
        """(state.json of a checkpoint, None), or (None, what is wrong with it). Of its files only sizes are compared."""
        folder = self.root / name
        if not name:
            return None, self._lost_latest()
        try:
            about = json.loads((folder / ABOUT).read_text())
            if about["format"] not in READABLE:
                known = " and ".join(str(known) for known in READABLE)
                return None, f"checkpoint {folder} has format {about['format']}; this version reads formats {known}"
            wrong = about["files"].items() - file_sizes(folder).items()
        except (OSError, ValueError, KeyError) as error:
            return None, self.damaged(name, str(error))
        if wrong:
            return None, self.damaged(name, f"{min(wrong)[0]} is missing or has another size")
        return about, None

    def _intact(self, before: str) -> str | None:
        """The most recent checkpoint before one that has all its files, else the most recent of all."""
        whole = []
        for step in self.complete():
            with contextlib.suppress(OSError, ValueError, KeyError):
                if not self.about(step)["files"].items() - file_sizes(self.place(step)).items():
                    whole.append(step_name(step))
        older = [name for name in whole if step_of(before) is None or step_of(name) < step_of(before)]
        return next(reversed(older or [name for name in whole if name != before]), None)

    def _lost_latest(self) -> str:
        text = self._latest_text()
        wrong = (
            f"names no checkpoint ({text[:40]!r})"
            if text
            else "is empty"
            if self.latest_file.exists()
            else "is missing"
        )
        wrong = f"{self.latest_file} {wrong}, but there are checkpoints"
        if name := self._intact(""):
            return f"{wrong}: `echo {name} > {self.latest_file}` resumes from the most recent one"
        return f"{wrong}, all of them damaged: start over in another run folder"

    def damaged(self, name: str, problem: str) -> str:
        """The error message for a damaged checkpoint, with the command that goes back to the most recent intact one.

        Training never falls back on its own: that would silently repeat hours of work.
        """
        text = f"checkpoint {self.root / name} is damaged ({problem})"
        if other := self._intact(name):
            back = f"`echo {other} > {self.latest_file}`"
            return f"{text}. The most recent intact one is of step {step_of(other)}: {back} goes back to it"
        return f"{text}, and there is no older intact one: start over in another run folder"
