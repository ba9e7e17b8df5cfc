"""Sources of images for `evaluate` and `sample`: the generator, the teacher, the untrained start, a checkpoint, a folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.families import family_of
from models.lora import is_adapter, load_merged
from models.pipeline import INFO_FILE, LORA_FOLDER, load_network
from models.sampler import ImageNoise, Sampler
from models.validate import check_fit, check_pipeline
from trainer.checkpoint.directory import WEIGHTS, CheckpointDirectory
from trainer.errors import UserError
from trainer.training.run import Run


@dataclass(frozen=True)
class Source:
    """A denoiser and what it needs to make images.

    name: names the folder of its results. weights: its denoiser folder or LoRA folder. pipeline: the folder with text
    encoders, decoder and schedule. timesteps: the steps of a student (one step: the conditioning timestep); None for a
    diffusion model. base: the denoiser folder that a LoRA folder is merged into, as `export` does.
    """

    name: str
    weights: Path
    pipeline: Path
    timesteps: tuple[int, ...] | None
    base: Path | None = None

    def open(self, run: Run) -> "OpenSource":
        """Loads it onto this rank's device."""
        variant = run.settings.variant
        check_fit(check_pipeline(self.pipeline, variant), run.settings.data.resolution)
        if self.base:
            network = load_merged(self.base, self.weights, run.dtype, variant)
        else:
            network = load_network(self.weights, run.dtype, variant)
        network.to(run.world.device).eval().requires_grad_(False)
        return OpenSource(self, run, network, run.sampler(self.pipeline))


@dataclass(frozen=True)
class OpenSource:
    """A loaded source."""

    source: Source
    run: Run
    network: nn.Module
    sampler: Sampler

    def all_images(self, captions: list[str], seed: int, batch: int) -> Tensor:
        """As `images`, of all captions, numbered from 0, in batches; on the CPU."""
        parts = [range(first, min(first + batch, len(captions))) for first in range(0, len(captions), batch)]
        return torch.cat([self.images([captions[i] for i in part], seed, list(part)).cpu() for part in parts])

    def images(self, captions: list[str], seed: int, indices: list[int]) -> Tensor:
        """uint8 images [B, 3, H, W]; image i depends only on its caption and seed + i."""
        noise = ImageNoise(seed, indices, self.sampler.latent_shape, self.run.world.device)
        if self.source.timesteps is not None:
            return self.sampler.generator_images(self.network, captions, noise, self.source.timesteps)
        settings = self.run.settings.sample
        return self.sampler.diffusion_images(
            self.network, captions, noise.draw(), settings.steps, settings.guidance_scale
        )


def find_source(run: Run, what: str) -> Source:
    """The source that `evaluate.what` or `sample.source` names. Raises UserError if there is no such source."""
    timesteps = run.settings.student_timesteps
    if what == "generator":
        folder = run.folder / "generator"
        if not (folder / "model_index.json").exists():
            raise UserError(
                f"{folder} does not exist: finish `disback backtrack`, or name a checkpoint such as step-00000500"
            )
        return _pipeline(folder, "generator")
    if what == "teacher":
        return Source("teacher", run.teacher_folder, run.pipeline_folder, None)
    if what == "start":
        return Source("start", run.start_folder, run.pipeline_folder, timesteps)
    checkpoints = CheckpointDirectory(run.folder / "backtrack")
    known = checkpoints.with_weights()
    if what in known:
        return _weights(run, what, checkpoints.weights(what))
    folder = Path(what)
    name = folder.resolve().name
    if (folder / "model_index.json").exists():
        return _pipeline(folder, name)
    for weights in (folder / WEIGHTS, folder):  # a checkpoint's folder; a denoiser or LoRA folder
        if (weights / "config.json").exists() or is_adapter(weights):
            return _weights(run, name, weights)
    raise UserError(
        f"'{what}' is not generator, teacher, start, a checkpoint of {run.folder} ({', '.join(known) or 'it has none'}), "
        "a pipeline folder, a denoiser folder or a LoRA folder"
    )


def _weights(run: Run, name: str, folder: Path) -> Source:
    """A student, from its denoiser folder, or from its LoRA folder on the network that it started from."""
    base = run.start_folder if is_adapter(folder) else None
    return Source(name, folder, run.pipeline_folder, run.settings.student_timesteps, base)


def _pipeline(folder: Path, name: str) -> Source:
    """A pipeline folder; one that `export` wrote has a note with the student's timesteps, and perhaps a LoRA folder."""
    note = folder / INFO_FILE
    steps = json.loads(note.read_text()).get("timesteps") if note.exists() else None
    timesteps = tuple(steps) if steps else None
    network, lora = folder / family_of(folder).part, folder / LORA_FOLDER
    if is_adapter(lora):
        return Source(name, lora, folder, timesteps, network)
    return Source(name, network, folder, timesteps)
