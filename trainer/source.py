"""What images can be made from: a run's generator, its teacher, its untrained start, a checkpoint, or a folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel
from torch import Tensor

from models.lora import is_adapter, load_merged
from models.pipeline import LORA_FOLDER, NOTE, check_pipeline, load_unet
from models.sampler import Sampler, image_noise
from trainer.errors import UserError
from trainer.run import Run
from trainer.runstate import WEIGHTS


@dataclass(frozen=True)
class Source:
    """name: for folders of results. unet: weights folder. pipeline: where text encoders, decoder and schedule are.
    timestep: the conditioning timestep of a one-step generator, None for a diffusion model. lora: a LoRA folder to be
    merged into the UNet, as `export` does it."""

    name: str
    unet: Path
    pipeline: Path
    timestep: int | None
    lora: Path | None = None

    @property
    def weights(self) -> Path:
        """The folder that makes the difference: the LoRA's, if there is one."""
        return self.lora or self.unet

    def open(self, run: Run) -> "OpenSource":
        check_pipeline(self.pipeline)
        unet = load_merged(self.unet, self.lora, run.dtype) if self.lora else load_unet(self.unet, run.dtype)
        unet.to(run.world.device).eval().requires_grad_(False)
        return OpenSource(self, run, unet, run.sampler(self.pipeline))


@dataclass(frozen=True)
class OpenSource:
    source: Source
    run: Run
    unet: UNet2DConditionModel
    sampler: Sampler

    def images(self, captions: list[str], seed: int, indices: list[int]) -> Tensor:
        """uint8 images [B, 3, H, W]; image i is a function of its caption and seed + i."""
        z = image_noise(seed, indices, self.sampler.latent_shape, self.run.world.device)
        if self.source.timestep is not None:
            return self.sampler.one_step(self.unet, captions, z, self.source.timestep)
        settings = self.run.settings.sample
        return self.sampler.many_steps(self.unet, captions, z, settings.steps, settings.guidance_scale)


def find_source(run: Run, what: str) -> Source:
    """The source that a user names. Raises UserError if there is no such thing."""
    settings, timestep = run.settings, run.settings.conditioning_timestep
    if what == "generator":
        folder = run.folder / "generator"
        if not (folder / "model_index.json").exists():
            raise UserError(
                f"{folder} is not there: finish `disback backtrack`, or name a checkpoint such as step-00000500"
            )
        return _pipeline(folder, "generator")
    if what == "teacher":
        return Source("teacher", settings.pipeline_folder / "unet", settings.pipeline_folder, None)
    if what == "start":
        return Source("start", settings.start_folder, settings.pipeline_folder, timestep)
    checkpoint = run.folder / "backtrack" / "checkpoints" / what / WEIGHTS
    if checkpoint.is_dir():
        return _weights(run, what, checkpoint)
    folder = Path(what)
    if (folder / "model_index.json").exists():
        return _pipeline(folder, folder.resolve().name)
    for weights in (folder / WEIGHTS, folder):  # a checkpoint by its path; a UNet or LoRA folder
        if (weights / "config.json").exists() or is_adapter(weights):
            return _weights(run, folder.resolve().name, weights)
    known = sorted(p.parent.name for p in (run.folder / "backtrack" / "checkpoints").glob(f"step-*/{WEIGHTS}"))
    raise UserError(
        f"'{what}' is not generator, teacher, start, a checkpoint of {run.folder} ({', '.join(known) or 'none there'}), a "
        "pipeline folder, a UNet folder or a LoRA folder"
    )


def _weights(run: Run, name: str, folder: Path) -> Source:
    """A one-step generator by its UNet folder, or by its LoRA folder on the network that it starts from."""
    settings = run.settings
    unet, lora = (settings.start_folder, folder) if is_adapter(folder) else (folder, None)
    return Source(name, unet, settings.pipeline_folder, settings.conditioning_timestep, lora)


def _pipeline(folder: Path, name: str) -> Source:
    note = folder / NOTE
    timestep = json.loads(note.read_text()).get("conditioning_timestep") if note.exists() else None
    lora = folder / LORA_FOLDER
    return Source(name, folder / "unet", folder, timestep, lora if is_adapter(lora) else None)
