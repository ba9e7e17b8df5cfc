"""`disback pretrain`: trains a teacher, from scratch (the miniature) or from a pipeline folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from models.conditioning import image_time_ids
from models.denoise import denoising_loss
from models.families import family_of
from models.miniature import build_miniature
from models.offload import to_device
from models.pipeline import replace_folder
from trainer.checkpoint.directory import WEIGHTS, CheckpointDirectory
from trainer.distributed.logs import log
from trainer.distributed.world import barrier
from trainer.engine.save_weights import Snapshot
from trainer.entry import exit_with, run_verb
from trainer.planner.flops import pretrain_flops
from trainer.training.autoencoder import train_autoencoder
from trainer.training.inputs import batch_latents
from trainer.training.loop import train
from trainer.training.run import Run
from trainer.training.stage import DenoiserStage
from trainer.training.state_parts import WeightAverage


class Pretraining(DenoiserStage):
    """Denoising score matching on shards, with caption dropout and a weight average."""

    def update(self, step: int) -> None:
        rate = self.rates(step)["teacher"]
        for batch in self.micro_batches():
            draws = self.noise.at(step, batch.index)
            x0 = batch_latents(batch, self.sampler, draws.normal("posterior", self.latent_shape(batch)))
            sizes, crops = (to_device(x, self.world.device) for x in (batch.original_sizes, batch.crops))
            cond = self.encode(batch, image_time_ids(sizes, crops, self.size(batch)))
            cond = cond.dropped(draws.uniform("dropout") < self.settings.caption_dropout)
            t = self.schedule.timesteps(draws.uniform("t"))
            eps = draws.normal("eps", tuple(x0.shape[1:]))
            loss = denoising_loss(self.teacher, self.schedule, x0, eps, t, cond)
            self.meters.add("loss/teacher", loss)
            self.teacher.step(loss, rate)
        self.average.update()

    def __init__(self, run: Run, start: Path):
        settings = run.settings.pretrain
        super().__init__("pretrain", run, settings, images=True, pipeline=start)
        if settings.loop.sample_every:
            self.sampler.scheduler(run.settings.sample.steps)  # refuses too many before the first grid
        folder = start / self.sampler.text.family.part
        self.teacher = self.add_role(self.builder.build("teacher", folder, settings.ds_config, settings.optimizer))
        self.average = WeightAverage(self.teacher, settings.ema)
        self.parts["ema"] = self.average
        self.count_flops(pretrain_flops, self.teacher, lora=False)

    def preview(self) -> Tensor:
        steps, scale = self.run.settings.sample.steps, self.run.settings.sample.guidance_scale
        with self.average.applied():
            return self.grid(
                lambda captions, noise: self.sampler.diffusion_images(
                    self.teacher, captions, noise.draw(), steps, scale
                )
            )

    def snapshots(self) -> dict[str, Callable[[], Snapshot | None]]:
        return {WEIGHTS: self.average.snapshot}


def _start(run: Run, folder: Path) -> Path:
    """The pipeline folder that training starts from; the miniature is built there once."""
    settings = run.settings.pretrain
    if settings.start != "miniature":
        return run.checked(run.fetched(settings.start, "pretrain.start"))
    start = folder / "start"
    if run.world.main and not start.exists():
        log.info(f"building a miniature pipeline in {start}")
        temporary = start.with_name("start.tmp")
        build_miniature(settings.miniature).save_pretrained(temporary, safe_serialization=True)
        replace_folder(temporary, start)
    barrier(run.world)
    run.checked(start)
    if not (start / "autoencoder.json").exists():
        vae, scale = train_autoencoder(run, start)
        if run.world.main:
            replace_folder(vae, start / "vae")
            (start / "autoencoder.json").write_text(json.dumps({"scaling_factor": scale}) + "\n")
        barrier(run.world)
    return start


def pretrain(run: Run) -> None:
    """Trains the teacher and writes `pipeline/`. Does nothing if it exists."""
    out = run.folder / "pipeline"
    if (out / "model_index.json").exists():
        if run.world.main:
            print(f"{out} exists: nothing to do (name another run folder to train another teacher)")
        return
    with run.training("pretrain") as folder:
        start = _start(run, folder)
        folder = run.stage_folder("pretrain")  # the autoencoder's training logged to its own folder
        stage = Pretraining(run, start)
        seconds = train(stage, run.settings.pretrain.loop, run.settings.health, folder, run.world)
        if run.world.main:
            temporary = out.with_name("pipeline.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            part = family_of(start).part
            shutil.copytree(start, temporary, ignore=shutil.ignore_patterns(part, "autoencoder.json"))
            shutil.copytree(CheckpointDirectory(folder).latest_weights(), temporary / part)
            note = {"train_seconds": seconds, "steps": stage.steps}
            (temporary / "disback.json").write_text(json.dumps(note, indent=2) + "\n")
            replace_folder(temporary, out)
            log.info(f"pretrain: wrote {out}")
        barrier(run.world)


def main(argv: list[str] | None = None) -> int:
    return run_verb("pretrain", "Trains or fine-tunes a teacher on shards; writes RUN/pipeline.", pretrain, argv)


if __name__ == "__main__":
    exit_with(main)
