"""What images can be made from: a run's generator, its teacher, its untrained start, a checkpoint, or a folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from models.families import family_of
from models.lora import is_adapter, load_merged
from models.pipeline import LORA_FOLDER, NOTE, load_network
from models.sampler import ImageNoise, Sampler
from models.validate import check_fit, check_pipeline
from trainer.checkpoint.directory import WEIGHTS
from trainer.errors import UserError
from trainer.training.run import Run


@dataclass(frozen=True)
class Source:
    """name: for folders of results. weights: the denoiser's folder, or a LoRA folder. pipeline: where text encoders,
    decoder and schedule are. timesteps: of a student's steps (one: the conditioning timestep), None for a diffusion
    model. base: the denoiser's folder that a LoRA folder is merged into, as `export` does it."""

    name: str
    weights: Path
    pipeline: Path
    timesteps: tuple[int, ...] | None
    base: Path | None = None

    def open(self, run: Run) -> "OpenSource":
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
        return _weights(run, what, checkpoint)
    folder = Path(what)
    if (folder / "model_index.json").exists():
        return _pipeline(folder, folder.resolve().name)
    for weights in (folder / WEIGHTS, folder):  # a checkpoint by its path; a denoiser or LoRA folder
        if (weights / "config.json").exists() or is_adapter(weights):
            return _weights(run, folder.resolve().name, weights)
    known = sorted(p.parent.name for p in (run.folder / "backtrack" / "checkpoints").glob(f"step-*/{WEIGHTS}"))
    raise UserError(
        f"'{what}' is not generator, teacher, start, a checkpoint of {run.folder} ({', '.join(known) or 'none there'}), a "
        "pipeline folder, a denoiser folder or a LoRA folder"
    )


def _weights(run: Run, name: str, folder: Path) -> Source:
    """A student by its denoiser's folder, or by its LoRA folder on the network that it starts from."""
    base = run.start_folder if is_adapter(folder) else None
    return Source(name, folder, run.pipeline_folder, run.settings.student_timesteps, base)


def _pipeline(folder: Path, name: str) -> Source:
    note = folder / NOTE
    steps = json.loads(note.read_text()).get("timesteps") if note.exists() else None
    timesteps = tuple(steps) if steps else None
    network, lora = folder / family_of(folder).part, folder / LORA_FOLDER
    if is_adapter(lora):
        return Source(name, lora, folder, timesteps, network)
    return Source(name, network, folder, timesteps)
