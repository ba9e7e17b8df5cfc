"""One run: its settings, its folder, its processes; what every verb is given."""

import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import yaml

from data.patterns import expand
from data.reader import ShardDataset
from models.noise import SampleNoise
from models.sampler import Sampler
from trainer.distributed import World, barrier
from trainer.errors import UserError
from trainer.settings import RunSettings
from trainer.telemetry import start_log
from trainer.version import VERSION


@dataclass(frozen=True)
class Run:
    settings: RunSettings
    world: World
    fresh: bool = False

    @property
    def folder(self) -> Path:
        return self.settings.folder

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.settings.precision == "bf16" else torch.float32

    def noise(self, stage: str) -> SampleNoise:
        """Per-sample noise; every stage draws from streams of its own name."""
        return SampleNoise(f"{self.settings.seed}/{stage}", self.world.device)

    def dataset(self, split: str, want: tuple[str, ...]) -> ShardDataset:
        """The samples of `data.train` or `data.heldout`; want: of "image", "caption", "meta". Raises DataError."""
        data = self.settings.data
        paths = expand(getattr(data, split), f"data.{split}")
        return ShardDataset(paths, data.resolution, want, self.settings.seed, data.image_keys, data.caption_key)

    def sampler(self, pipeline: Path) -> Sampler:
        return Sampler.load(pipeline, self.settings.data.resolution, self.dtype, self.world.device)

    def stage_folder(self, stage: str, training: bool = True) -> Path:
        """The stage's folder, made and checked to be writable; if the stage trains, the run's resolved configuration is
        written beside it. Messages go to its log.txt from here on.

        Raises UserError if it cannot be written, or for --fresh on a folder with a checkpoint.
        """
        folder = self.folder / stage
        if self.fresh and (folder / "LATEST").exists():
            raise UserError(f"--fresh: {folder} has a checkpoint: name another run folder (run=...) or remove this one")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.world.main and training:
                (self.folder / "config.yaml").write_text(self._resolved())
        except OSError as error:
            raise UserError(
                f"run folder {self.folder}: cannot be written: {error.strerror}: choose another with run=..."
            ) from error
        barrier(self.world)
        start_log(folder, self.world)
        return folder

    def _resolved(self) -> str:
        names = ("torch", "deepspeed", "diffusers", "transformers", "webdataset", "xformers", "open_clip_torch")
        about = {
            "disback": VERSION,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in names},
            "git_commit": _commit(),
            "world_size": self.world.size,
            "device": self.world.device.type,
        }
        return yaml.safe_dump({"about": about, **self.settings.model_dump(mode="json")}, sort_keys=False)


def _commit() -> str | None:
    """The commit of the source tree that runs, "+" if it has changes; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        call = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
