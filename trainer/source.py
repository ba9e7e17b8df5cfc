"""What images can be made from: a run's generator, its teacher, its untrained start, a checkpoint, or a folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from models.checks import check_fit, check_pipeline
from models.families import family_of
from models.pipeline import NOTE, load_network
from models.sampler import ImageNoise, Sampler
from trainer.errors import UserError
from trainer.run import Run
from trainer.shelf import WEIGHTS


@dataclass(frozen=True)
class Source:
    """name: for folders of results. weights: the denoiser's folder. pipeline: where text encoders, decoder and schedule
    are. timesteps: of a student's steps (one: the conditioning timestep), None for a diffusion model."""

    name: str
    weights: Path
    pipeline: Path
    timesteps: tuple[int, ...] | None

    def open(self, run: Run) -> "OpenSource":
        variant = run.settings.variant
        check_fit(check_pipeline(self.pipeline, variant), run.settings.data.resolution)
        network = load_network(self.weights, run.dtype, variant).to(run.world.device).eval().requires_grad_(False)
        return OpenSource(self, run, network, run.sampler(self.pipeline))


@dataclass(frozen=True)
class OpenSource:
    source: Source
    run: Run
    network: nn.Module
    sampler: Sampler

    def images(self, captions: list[str], seed: int, indices: list[int]) -> Tensor:
        """uint8 images [B, 3, H, W]; image i is a function of its caption and seed + i."""
        noise = ImageNoise(seed, indices, self.sampler.latent_shape, self.run.world.device)
        if self.source.timesteps is not None:
            return self.sampler.student(self.network, captions, noise, self.source.timesteps)
        settings = self.run.settings.sample
        return self.sampler.many_steps(self.network, captions, noise.draw(), settings.steps, settings.guidance_scale)


def find_source(run: Run, what: str) -> Source:
    """The source that a user names. Raises UserError if there is no such thing."""
    timesteps = run.settings.student_timesteps
    if what == "generator":
        folder = run.folder / "generator"
        if not (folder / "model_index.json").exists():
            raise UserError(
                f"{folder} is not there: finish `disback backtrack`, or name a checkpoint such as step-00000500"
            )
        return _pipeline(folder, "generator")
    if what == "teacher":
        return Source("teacher", run.teacher_folder, run.pipeline_folder, None)
    if what == "start":
        return Source("start", run.start_folder, run.pipeline_folder, timesteps)
    checkpoint = run.folder / "backtrack" / "checkpoints" / what / WEIGHTS
    if checkpoint.is_dir():
        return Source(what, checkpoint, run.pipeline_folder, timesteps)
    folder = Path(what)
    if (folder / "model_index.json").exists():
        return _pipeline(folder, folder.resolve().name)
    if (folder / WEIGHTS / "config.json").exists():  # a checkpoint by its path
        return Source(folder.resolve().name, folder / WEIGHTS, run.pipeline_folder, timesteps)
    if (folder / "config.json").exists():
        return Source(folder.resolve().name, folder, run.pipeline_folder, timesteps)
    known = sorted(p.parent.name for p in (run.folder / "backtrack" / "checkpoints").glob(f"step-*/{WEIGHTS}"))
    raise UserError(
        f"'{what}' is not generator, teacher, start, a checkpoint of {run.folder} ({', '.join(known) or 'none there'}), a "
        "pipeline folder or a denoiser folder"
    )


def _pipeline(folder: Path, name: str) -> Source:
    note = folder / NOTE
    timesteps = json.loads(note.read_text()).get("timesteps") if note.exists() else None
    return Source(name, folder / family_of(folder).part, folder, tuple(timesteps) if timesteps else None)
