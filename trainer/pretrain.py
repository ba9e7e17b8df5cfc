"""`disback pretrain`: trains a teacher, from scratch (the miniature) or from a pipeline folder."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models.conditioning import image_time_ids
from models.ema import Ema
from models.flops import forward_flops
from models.miniature import build_miniature
from models.networks import denoising_loss
from models.pipeline import check_pipeline, replace_folder
from trainer.autoencoder import train_autoencoder
from trainer.command import run_verb
from trainer.distributed import barrier
from trainer.loop import train
from trainer.run import Run
from trainer.runstate import WEIGHTS
from trainer.schedules import learning_rate
from trainer.stage import TrainStage
from trainer.telemetry import Meters, log


class Pretraining(TrainStage):
    """Denoising score matching on shards, with caption dropout and an average of the weights."""

    def __init__(self, run: Run, start: Path):
        settings = run.settings.pretrain
        super().__init__("pretrain", run, settings, images=True)
        self.sampler = run.sampler(start)
        self.schedule = self.sampler.schedule
        self.teacher = self.role("teacher", start / "unet", settings.ds_config, settings.optimizer)
        flops = forward_flops(self.teacher.config, self.sampler.latent_shape, self.sampler.text.tokens)
        self.flops = 3 * flops * self.micro * settings.accumulation
        self.ema = Ema(self.teacher.local(), settings.ema)

    def _latents(self, images: Tensor, step: int, index: list[int]) -> Tensor:
        """Scaled latents of images, drawn from the autoencoder's posterior."""
        vae = self.sampler.vae
        with torch.no_grad():
            posterior = vae.encode(images.to(self.world.device, non_blocking=True)).latent_dist
        eps = self.noise.normal("posterior", step, index, tuple(posterior.mean.shape[1:]))
        return (posterior.mean + posterior.std * eps) * vae.config.scaling_factor

    def update(self, step: int, meters: Meters, until_log: int) -> None:
        self.rate = learning_rate(self.settings.optimizer, step, self.steps)
        for batch in self.micro_batches(meters):
            x0 = self._latents(batch.images, step, batch.index)
            resolution = self.run.settings.data.resolution
            time_ids = image_time_ids(batch.original_sizes, batch.crops, resolution).to(self.world.device)
            cond = self.sampler.text.encode(batch.captions, time_ids)
            cond = cond.dropped(self.noise.uniform("dropout", step, batch.index) < self.settings.caption_dropout)
            t = self.schedule.timesteps(self.noise.uniform("t", step, batch.index))
            eps = self.noise.normal("eps", step, batch.index, tuple(x0.shape[1:]))
            loss = denoising_loss(self.teacher, self.schedule, x0, eps, t, cond)
            meters.add("loss/teacher", loss)
            norm = self.teacher.step(loss, self.rate, want_norm=until_log == 0)
            if norm is not None:
                self.norm = norm
        self.ema.update(self.teacher.local())

    def metrics(self) -> dict:
        return super().metrics() | {"lr/teacher": self.rate, "grad_norm/teacher": self.norm}

    def preview(self) -> Tensor:
        settings = self.run.settings.sample
        z = self.preview_noise(self.sampler.latent_shape)
        with self.teacher.averaged(self.ema):
            images = self.sampler.many_steps(
                self.teacher, self.preview_captions(), z, settings.steps, settings.guidance_scale
            )
        return self.grid(images)

    def weights_writer(self) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            with self.teacher.averaged(self.ema):
                self.save_weights(self.teacher, folder, self.run.dtype)

        return write

    def state_dict(self) -> dict:
        return super().state_dict() | {"ema": self.ema.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.ema.load_state_dict(state["ema"])


def _start(run: Run, folder: Path) -> Path:
    """The pipeline folder that training starts from; the miniature is built there once."""
    settings = run.settings.pretrain
    if settings.start != "miniature":
        return check_pipeline(Path(settings.start))
    start = folder / "start"
    if run.world.main and not start.exists():
        log.info(f"building a miniature pipeline in {start}")
        temporary = start.with_name("start.tmp")
        build_miniature(settings.miniature).save_pretrained(temporary, safe_serialization=True)
        replace_folder(temporary, start)
    barrier(run.world)
    if not (start / "autoencoder.json").exists():
        vae, scale = train_autoencoder(run, start)
        if run.world.main:
            replace_folder(vae, start / "vae")
            (start / "autoencoder.json").write_text(json.dumps({"scaling_factor": scale}) + "\n")
        barrier(run.world)
    return start


def pretrain(run: Run) -> None:
    """Trains the teacher and writes `pipeline/`. Does nothing if that is there already."""
    out = run.folder / "pipeline"
    if (out / "model_index.json").exists():
        print(f"{out} is there: nothing to do (name another run folder to train another teacher)")
        return
    start = _start(run, run.stage_folder("pretrain"))
    folder = run.stage_folder("pretrain")  # the log goes on there, after the autoencoder's
    stage = Pretraining(run, start)
    seconds = train(stage, run.settings.pretrain.loop, run.settings.health, folder, run.world)
    if run.world.main:
        last = folder / "checkpoints" / (folder / "LATEST").read_text().strip() / WEIGHTS
        temporary = out.with_name("pipeline.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(start, temporary, ignore=shutil.ignore_patterns("unet", "autoencoder.json"))
        shutil.copytree(last, temporary / "unet")
        note = {"train_seconds": seconds, "steps": stage.steps}
        (temporary / "disback.json").write_text(json.dumps(note, indent=2) + "\n")
        replace_folder(temporary, out)
        log.info(f"pretrain: wrote {out}")
    barrier(run.world)


def main(argv: list[str] | None = None) -> int:
    return run_verb("pretrain", "Trains or fine-tunes a teacher on shards; writes RUN/pipeline.", pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
