"""One run: its settings, its folder, its processes. Every verb gets one."""

import contextlib
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path

import torch
import yaml

from data.sources import Source, open_dataset
from models.families import family_of
from models.lora import check_targets
from models.noise import SampleNoise
from models.pipeline import weights_hash
from models.sampler import Sampler
from models.validate import check_fit, check_pipeline, check_start
from trainer import VERSION
from trainer.checkpoint.directory import CheckpointDirectory
from trainer.checkpoint.files import write_text
from trainer.config.schema import RunSettings
from trainer.distributed.lock import LOCK
from trainer.distributed.logs import log, start_log
from trainer.distributed.world import World, barrier, from_main, locked_for
from trainer.errors import UserError
from trainer.training.hub import local_pipeline
from trainer.training.weight_hashes import WeightHashes


@dataclass(frozen=True)
class Run:
    settings: RunSettings
    world: World
    fresh: bool = False
    _hashes: dict[Path, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.settings.folder

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.settings.precision == "bf16" else torch.float32

    @cached_property
    def pipeline_folder(self) -> Path:
        """The teacher's pipeline folder, fetched from the hub if `pipeline` names a model there, and checked against the
        settings. The first access is collective: every rank must make it. Raises UserError and ModelError."""
        name = self.settings.pipeline
        folder = self.fetched(name, "pipeline") if name else self.folder / "pipeline"
        return self.checked(folder, self.settings.student_timesteps)

    def require_pipeline(self) -> None:
        """Fetches and checks the networks that a run starts from: for the start of a verb, before anything is written."""
        _ = self.pipeline_folder, self.start_folder

    @property
    def teacher_folder(self) -> Path:
        """The weights folder of the teacher's denoiser."""
        return self.pipeline_folder / family_of(self.pipeline_folder).part

    @cached_property
    def digest(self) -> WeightHashes:
        """Hashes weight files, or remembers their hashes from an earlier start; for rank 0."""
        return WeightHashes(self.folder)

    @property
    def start_folder(self) -> Path:
        """The weights folder that the generator starts from."""
        start = self.settings.generator_start
        return check_start(Path(start), self.settings.variant) if start else self.teacher_folder

    def checked(self, folder: Path, timesteps: tuple[int, ...] = ()) -> Path:
        """The pipeline folder, if it is complete and fits the settings and the generator's timesteps. Raises ModelError."""
        s, buckets = self.settings, self.settings.data.selection.buckets
        check_fit(check_pipeline(folder, s.variant), s.data.resolution, timesteps, s.variant, buckets)
        return folder

    def fetched(self, pipeline: str, key: str) -> Path:
        """The local folder of a pipeline that the setting `key` names. Every rank must call it."""
        return local_pipeline(pipeline, self.settings.variant, key, self.world)

    def weights_hash(self, folder: Path) -> str:
        """The sha256 of a weights folder, read once, by rank 0 alone. Every rank must call it."""
        if folder not in self._hashes:
            mine = weights_hash(folder, self.settings.variant, digest=self.digest) if self.world.main else None
            self._hashes[folder] = from_main(mine, self.world)
        return self._hashes[folder]

    def check_lora(self, *folders: Path) -> None:
        """Raises ModelError, before anything is loaded, if adapters are wanted and a network lacks the layers for them."""
        for folder in set(folders) if self.settings.lora.rank else ():
            check_targets(folder, self.settings.lora, self.settings.variant)

    def noise(self, stage: str) -> SampleNoise:
        """Per-sample noise; every stage draws from streams of its own name."""
        return SampleNoise(f"{self.settings.seed}/{stage}", self.world.device)

    def dataset(self, split: str, want: tuple[str, ...], batch: int = 1) -> Source:
        """The samples of `data.train`, `data.heldout` or `data.labelled`. want: what to read of them; batch: samples per step;
        see ShardDataset. Raises DataError."""
        return open_dataset(self.settings.data, split, want, self.settings.seed, batch, log.info)

    def sampler(self, pipeline: Path, dtype: torch.dtype | None = None) -> Sampler:
        """The sampler of a pipeline folder. dtype: of the text encoders (default: the run's)."""
        s = self.settings
        where = dtype or self.dtype, self.world.device
        return Sampler.load(pipeline, s.data.size, *where, s.variant, s.timestep_shift)

    @contextlib.contextmanager
    def training(self, stage: str, *shared: Path) -> Iterator[Path]:
        """The stage's folder, as `stage_folder` makes it, while no other job trains there, nor writes to the folders `shared`.
        Every rank must enter it. Raises UserError, and writes nothing, if another job does."""
        remedy = "wait for it, cancel it, or name another run folder (run=...)"
        folders = dict.fromkeys(folder.resolve() for folder in (self._made(stage), *shared))
        files = [folder / LOCK for folder in folders]
        with locked_for(f"disback {stage}", files, remedy, self.world):
            yield self.stage_folder(stage)

    def _made(self, stage: str) -> Path:
        try:
            (self.folder / stage).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run folder {self.folder}: cannot be written: {error.strerror}: choose another with run=..."
            ) from error
        return self.folder / stage

    def stage_folder(self, stage: str, training: bool = True) -> Path:
        """The stage's folder, created if need be; from here on messages also go to its log.txt. If the stage trains, the
        run's resolved configuration is written too.

        Raises UserError if the folder cannot be written, or with --fresh if it has a checkpoint.
        """
        folder = self.folder / stage
        if self.fresh and CheckpointDirectory(folder).latest():
            raise UserError(f"--fresh: {folder} has a checkpoint: name another run folder (run=...) or remove this one")
        self._made(stage)
        try:
            if self.world.main and training:
                write_text(self._resolved(), self.folder / "config.yaml", durable=False)
        except OSError as error:
            raise UserError(
                f"run folder {self.folder}: cannot be written: {error.strerror}: choose another with run=..."
            ) from error
        barrier(self.world)
        start_log(folder, self.world.main)
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
    """The git commit of the running source tree, with "+" if it has changes; None outside of a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        call = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
