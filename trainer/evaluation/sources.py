"""Sources of images for `evaluate` and `sample`: the generator, the teacher, the untrained start, a checkpoint, a node of the
path, a folder, a pipeline of the hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from models.families import family_of
from models.files import INFO_FILE, LORA_FOLDER, read_json
from models.lora import load_merged
from models.lora_files import describe_file, is_adapter
from models.pipeline import load_network
from models.sampler import ImageNoise, Sampler, to_uint8
from models.text_encoder import Size
from models.validate import check_fit, check_pipeline
from trainer.checkpoint.directory import RAW, WEIGHTS, CheckpointDirectory
from trainer.errors import UserError
from trainer.evaluation.protocols import Sampling
from trainer.training.hub import HUB_ID
from trainer.training.run import Run

PLAIN = Sampling()
OWN = re.compile(r"generator|teacher|start|nodes|references|(step|node)-\d+(-raw)?|.*(\.rows|\.tmp|\.old|-images)")


class OpenSource(Protocol):
    """A loaded source."""

    def images(self, captions: list[str], seed: int, indices: list[int], size: Size | None = None) -> Tensor:
        """uint8 images [B, 3, H, W] of a size (height, width), by default the run's; image i depends only on its caption, the
        size and, as the protocol says, on seed + i."""


def all_images(opened: OpenSource, captions: list[str], seed: int, batch: int) -> Tensor:
    """Images of all captions, numbered from 0, in batches; on the CPU."""
    parts = [range(first, min(first + batch, len(captions))) for first in range(0, len(captions), batch)]
    return torch.cat([opened.images([captions[i] for i in part], seed, list(part)).cpu() for part in parts])


@dataclass(frozen=True)
class Source:
    """A denoiser and what it needs to make images.

    name: names the folder of its results. weights: its denoiser folder, LoRA folder or LoRA file. pipeline: the folder with text
    encoders, decoder and schedule. timesteps: the steps of a student (one step: the conditioning timestep); None for a
    diffusion model. base: the denoiser folder that a LoRA folder is merged into, as `export` does. kind: "ema" or "raw",
    for a student whose weights are known to be one of them.
    """

    name: str
    weights: Path
    pipeline: Path
    timesteps: tuple[int, ...] | None
    base: Path | None = None
    kind: str | None = None

    def open(self, run: Run, sampling: Sampling = PLAIN) -> "OpenDenoiser":
        """Loads it onto this rank's device."""
        variant, dtype = run.settings.variant, _dtype(run, sampling)
        data = run.settings.data
        check_fit(check_pipeline(self.pipeline, variant), data.resolution, buckets=data.selection.buckets)
        if self.base:
            network = load_merged(self.base, self.weights, dtype, variant)
        else:
            network = load_network(self.weights, dtype, variant)
        network.to(run.world.device).eval().requires_grad_(False)
        sampler = run.sampler(self.pipeline, dtype)
        if self.timesteps is None:
            sampler.scheduler(run.settings.sample.steps)  # refuses too many before anything is made
        sampler.rounded = sampling.rounded
        if sampling.one_tokenizer and getattr(sampler.text.parts, "tokenizer_2", None):
            sampler.text.parts.tokenizer_2 = sampler.text.parts.tokenizer
        return OpenDenoiser(self, run, network, sampler, sampling.noise)


@dataclass(frozen=True)
class OpenDenoiser:
    """A loaded `Source`."""

    source: Source
    run: Run
    network: nn.Module
    sampler: Sampler
    noise: str = "image"

    def images(self, captions: list[str], seed: int, indices: list[int], size: Size | None = None) -> Tensor:
        shape = self.sampler.shape_of(size or self.sampler.size)
        noise = ImageNoise(seed, indices, shape, self.run.world.device, self.noise)
        if self.source.timesteps is not None:
            return self.sampler.generator_images(self.network, captions, noise, self.source.timesteps)
        settings = self.run.settings.sample
        return self.sampler.diffusion_images(
            self.network, captions, noise.draw(), settings.steps, settings.guidance_scale
        )


@dataclass(frozen=True)
class PipelineSource:
    """Somebody else's pipeline, sampled by its own diffusers code with `sample.steps` and `sample.guidance_scale`: a baseline
    such as SDXL-Turbo."""

    name: str
    pipeline: Path
    timesteps: None = None
    kind: str | None = None

    @property
    def weights(self) -> Path:
        return self.pipeline / family_of(self.pipeline).part

    def open(self, run: Run, sampling: Sampling = PLAIN) -> "OpenPipeline":
        """Loads it onto this rank's device."""
        variant = run.settings.variant
        data = run.settings.data
        check_fit(check_pipeline(self.pipeline, variant), data.resolution, buckets=data.selection.buckets)
        options = {"dtype": _dtype(run, sampling), "variant": variant or None, "safety_checker": None}
        if "safety_checker" not in read_json(self.pipeline / "model_index.json"):
            del options["safety_checker"]
        try:
            pipe = DiffusionPipeline.from_pretrained(self.pipeline, use_safetensors=True, **options)
        except Exception as error:  # of several libraries
            raise UserError(f"{self.pipeline}: diffusers cannot load it: {error}") from error
        steps = run.settings.sample.steps
        try:
            pipe.scheduler.set_timesteps(steps)
        except ValueError as error:
            raise UserError(
                f"sample.steps={steps}: the scheduler of {self.pipeline} cannot take them: {error}"
            ) from error
        pipe.set_progress_bar_config(disable=True)
        return OpenPipeline(run, pipe.to(run.world.device), sampling)


@dataclass(frozen=True)
class OpenPipeline:
    """A loaded `PipelineSource`."""

    run: Run
    pipe: DiffusionPipeline
    sampling: Sampling = PLAIN

    def images(self, captions: list[str], seed: int, indices: list[int], size: Size | None = None) -> Tensor:
        settings, (height, width) = self.run.settings.sample, size or self.run.settings.data.size
        factor = self.pipe.vae_scale_factor
        shape = self.pipe.vae.config.latent_channels, height // factor, width // factor
        noise = ImageNoise(seed, indices, shape, self.run.world.device, self.sampling.noise)
        options = {} if noise.first is None else {"latents": noise.draw().to(self.pipe.dtype)}
        images = self.pipe(
            captions,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            height=height,
            width=width,
            generator=noise.generators,
            output_type="pt",
            **options,
        ).images
        return to_uint8(2 * images.float() - 1, self.sampling.rounded)


def _dtype(run: Run, sampling: Sampling) -> torch.dtype:
    return torch.float32 if sampling.precision == "fp32" else run.dtype


def find_source(run: Run, what: str) -> Source | PipelineSource:
    """The source that `evaluate.what` or `sample.source` names. Every rank must call it: one of the hub may be downloaded.
    Raises UserError if there is no such source."""
    timesteps = run.settings.student_timesteps
    if what == "generator":
        folder = run.folder / "generator"
        if not (folder / "model_index.json").exists():
            raise UserError(
                f"{folder} does not exist: finish `disback backtrack`, or name a checkpoint such as step-00000500"
            )
        return _pipeline(folder, "generator", run.pipeline_folder)
    if what == "teacher":
        return Source("teacher", run.teacher_folder, run.pipeline_folder, None)
    if what == "start":
        return Source("start", run.start_folder, run.pipeline_folder, timesteps)
    checkpoints = CheckpointDirectory(run.folder / "backtrack")
    known = checkpoints.with_weights()
    if what in known:
        return _weights(run, what, checkpoints.weights(what), "ema")
    raw = checkpoints.weights(what.removesuffix("-raw"), RAW)
    if what.endswith("-raw") and raw.is_dir():
        return _weights(run, what, raw, "raw")
    node = run.settings.path_folder / what
    if re.fullmatch(r"node-\d{4}", what) and (node / "node.json").is_file():
        return Source(what, node, run.pipeline_folder, None, run.teacher_folder if is_adapter(node) else None)
    folder = Path(what)
    if folder.is_file():
        if is_adapter(folder):
            return _weights(run, _name(run, folder.with_suffix("")), folder)
        raise UserError(
            f"'{what}' is {describe_file(folder)}: a LoRA file, or a pipeline or denoiser folder in diffusers' format is expected"
        )
    name = _name(run, folder)
    if (folder / "model_index.json").exists():
        return _pipeline(folder, name, run.pipeline_folder)
    for weights in (folder / WEIGHTS, folder):  # a checkpoint's folder; a denoiser or LoRA folder
        if (weights / "config.json").exists() or is_adapter(weights):
            return _weights(run, name, weights)
    if not folder.exists() and HUB_ID.fullmatch(what):
        return _pipeline(run.fetched(what, "evaluate.what"), what.replace("/", "-"), run.pipeline_folder)
    raise UserError(
        f"'{what}' is not generator, teacher, start, a checkpoint of {run.folder} ({', '.join(known) or 'it has none'}), "
        "a node of its path, a pipeline folder, a denoiser folder, a LoRA folder or file, or a pipeline of the hub"
    )


def _name(run: Run, folder: Path) -> str:
    """The name of a folder's results. One outside of the run that is called like something of the run's also has the name of
    the run that it belongs to, or of its parent folder."""
    folder = folder.resolve()
    if folder.is_relative_to(run.folder.resolve()) or not OWN.fullmatch(folder.name):
        return folder.name
    owner = next(part.name for part in folder.parents if part.name not in ("backtrack", "checkpoints", WEIGHTS, RAW))
    return f"{owner}-{folder.name}"


def _weights(run: Run, name: str, folder: Path, kind: str | None = None) -> Source:
    """A student, from its denoiser folder, or from its LoRA folder on the network that it started from."""
    base = run.start_folder if is_adapter(folder) else None
    return Source(name, folder, run.pipeline_folder, run.settings.student_timesteps, base, kind)


def _pipeline(folder: Path, name: str, teacher: Path) -> Source | PipelineSource:
    """A pipeline folder. One that `export` wrote has a note with the student's timesteps, and perhaps a LoRA folder; the
    run's own teacher is sampled as in training; any other is sampled by its own code."""
    note = folder / INFO_FILE
    steps = read_json(note).get("timesteps") if note.exists() else None
    if not steps and folder.resolve() != teacher.resolve():
        return PipelineSource(name, folder)
    timesteps = tuple(steps) if steps else None
    network, lora = folder / family_of(folder).part, folder / LORA_FOLDER
    if is_adapter(lora):
        return Source(name, lora, folder, timesteps, network)
    return Source(name, network, folder, timesteps)
