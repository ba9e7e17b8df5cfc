"""The checkpoint folders of a stage on disk: which are whole, which are kept, whether the next one fits."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainer.checkpoint.durable import MARGIN, file_sizes, free_bytes, sync_folder, write_text
from trainer.distributed.logs import log

FORMAT = 2
WEIGHTS = "weights"  # in a checkpoint: what an evaluation reads, a plain folder of the denoiser, or a LoRA folder
ABOUT = "state.json"  # what makes a folder a whole checkpoint


def step_name(step: int) -> str:
    return f"step-{step:08d}"


class Retention(Protocol):
    """What is kept of older checkpoints; see trainer.training.loop.LoopSettings."""

    keep_last: int
    keep_every: int
    keep_weights_every: int


@dataclass(frozen=True)
class Shelf:
    """`checkpoints/` and LATEST in a stage's folder. Only rank 0 writes."""

    folder: Path
    retention: Retention

    @property
    def root(self) -> Path:
        return self.folder / "checkpoints"

    def place(self, step: int) -> Path:
        return self.root / step_name(step)

    def latest(self) -> str | None:
        """The name of the checkpoint that a resumed run goes back to."""
        file = self.folder / "LATEST"
        return file.read_text().strip() if file.exists() else None

    def about(self, step: int) -> dict:
        return json.loads((self.place(step) / ABOUT).read_text())

    def size(self, step: int) -> int:
        return sum(self.about(step)["files"].values())

    def whole(self, until: int | None = None) -> list[int]:
        """Steps that have a whole checkpoint, up to one."""
        steps = sorted(int(p.name[5:]) for p in self.root.glob("step-????????") if (p / ABOUT).exists())
        return [s for s in steps if until is None or s <= until]

    def needed(self) -> set[str]:
        """The files outside of the checkpoints that going back to any whole one needs."""
        return {name for step in self.whole() for name in self.about(step)["needs"]}

    def publish(self, step: int, temporary: Path, about: dict) -> None:
        """Makes a finished temporary folder the checkpoint of a step, the one that LATEST names, and prunes."""
        about = {"format": FORMAT, "step": step, **about, "files": file_sizes(temporary)}
        write_text(json.dumps(about, indent=2) + "\n", temporary / ABOUT)
        shutil.rmtree(self.place(step), ignore_errors=True)  # of a run that went back behind it, or died before LATEST
        os.replace(temporary, self.place(step))
        sync_folder(self.root)
        write_text(step_name(step) + "\n", self.folder / "LATEST")
        self._prune(self.whole(step)[: -self.retention.keep_last])

    def discard(self, *folders: Path) -> None:
        """Removes what an unfinished save left, but never what LATEST names."""
        for folder in folders:
            if folder.name != self.latest():
                shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, steps: list[int]) -> None:
        """Lets go of these checkpoints, but for every `keep_every`-th, and the plain weights of every
        `keep_weights_every`-th."""
        every, weights = self.retention.keep_every, self.retention.keep_weights_every
        for step in steps:
            if every and step % every == 0:
                continue
            whole = self.place(step)
            (whole / ABOUT).unlink()  # first: what is half deleted is not whole
            if weights and step % weights == 0:
                for part in whole.iterdir():
                    if part.name != WEIGHTS:
                        shutil.rmtree(part) if part.is_dir() else part.unlink()
            else:
                shutil.rmtree(whole)

    def make_room(self, step: int, first_size: int) -> None:
        """Raises OSError if the checkpoint of a step will not fit. It is taken to be as large as the last one, the
        first one as `first_size` bytes. Short of space, what this save would let go of anyway goes before it: never the
        checkpoint that LATEST names."""
        before = self.whole(step)
        needed = int((self.size(before[-1]) if before else first_size) * MARGIN)
        if free_bytes(self.root) < needed and (older := before[: -max(self.retention.keep_last - 1, 1)]):
            log.warning(f"{self.root}: short of space: what this save would let go of anyway goes before it")
            self._prune(older)
        if (free := free_bytes(self.root)) < needed:
            raise OSError(
                f"it takes about {needed / 1e9:.3g} GB and {self.root} has {free / 1e9:.3g} GB free; nothing was written "
                f"(loop.keep_last is {self.retention.keep_last})"
            )

    def examine(self, name: str) -> tuple[dict | None, str | None]:
        """What a checkpoint says of itself, or what is the matter with it: of every file only the size is looked at."""
        folder = self.root / name
        try:
            about = json.loads((folder / ABOUT).read_text())
            if about["format"] != FORMAT:
                return None, f"checkpoint {folder} has format {about['format']}; this version reads {FORMAT}"
            wrong = about["files"].items() - file_sizes(folder).items()
        except (OSError, ValueError, KeyError) as error:
            return None, self.damaged(name, str(error))
        if wrong:
            return None, self.damaged(name, f"{min(wrong)[0]} is missing or has another size")
        return about, None

    def damaged(self, name: str, problem: str) -> str:
        """What to tell the user. Nothing falls back by itself: that would repeat hours without a word to anybody."""
        text = f"checkpoint {self.root / name} is damaged ({problem})"
        for step in reversed(self.whole()):
            older = self.place(step)
            if older.name < name and not self.about(step)["files"].items() - file_sizes(older).items():
                back = f"`echo {older.name} > {self.folder / 'LATEST'}`"
                return f"{text}. The newest older whole one is of step {step}: {back} goes back to it"
        return f"{text}, and there is no older whole one: start over in another run folder"
