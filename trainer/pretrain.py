"""`disback pretrain`: trains a teacher, from scratch (the miniature) or from a pipeline folder."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from data.sampling_order import Split
from models.conditioning import image_time_ids
from models.denoise import denoising_loss
from models.ema import Ema
from models.families import family_of
from models.miniature import build_miniature
from models.pipeline import replace_folder
from models.profile_flops import forward_flops
from trainer.checkpoint.directory import WEIGHTS
from trainer.distributed.logs import log
from trainer.distributed.world import barrier
from trainer.engine.optimizer import learning_rate
from trainer.entry import run_verb
from trainer.training.autoencoder import train_autoencoder
from trainer.training.inputs import batch_latents
from trainer.training.loop import train
from trainer.training.metrics import Meters
from trainer.training.run import Run
from trainer.training.stage import TrainStage


class Pretraining(TrainStage):
    """Denoising score matching on shards, with caption dropout and an average of the weights."""

    def __init__(self, run: Run, start: Path):
        settings = run.settings.pretrain
        super().__init__("pretrain", run, settings, images=True, pipeline=start)
        self.sampler = self.open_sampler(start)
        self.schedule = self.sampler.schedule
        self.teacher = self.role(
            "teacher", start / self.sampler.text.family.part, settings.ds_config, settings.optimizer
        )
        flops = forward_flops(self.teacher.config, self.sampler.latent_shape, self.sampler.text.tokens)
        self.flops = 3 * flops * self.micro * settings.accumulation
        self.ema = Ema(self.teacher.local(), settings.ema)

    def update(self, step: int, meters: Meters, until_log: int) -> None:
        self.rate = learning_rate(self.settings.optimizer, step, self.steps)
        for batch in self.micro_batches(meters):
            posterior = self.noise.normal("posterior", step, batch.index, self.sampler.latent_shape)
            x0 = batch_latents(batch, self.sampler, posterior)
            resolution = self.run.settings.data.resolution
            time_ids = image_time_ids(batch.original_sizes, batch.crops, resolution).to(self.world.device)
            cond = self.encode(batch.captions, batch.cached, time_ids)
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
        steps, scale = self.run.settings.sample.steps, self.run.settings.sample.guidance_scale
        with self.teacher.averaged(self.ema):
            return self.preview_grid(
                lambda captions, noise: self.sampler.many_steps(self.teacher, captions, noise.draw(), steps, scale)
            )

    def weights_writer(self) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            state = self.teacher.state_dict(self.ema, self.run.dtype)
            if state is not None:
                self.saver(self.teacher)(state, folder=folder)

        return write

    def state_dict(self) -> dict:
        return super().state_dict() | {"ema": self.average_state(self.ema, self.teacher)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.ema.load_state_dict(state["ema"])

    def regroup(self, states: list[dict], saved: Split) -> dict:
        average = self.regroup_average([s["ema"] for s in states], self.ema, self.teacher)
        return super().regroup(states, saved) | {"ema": average}


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
        part = family_of(start).part
        shutil.copytree(start, temporary, ignore=shutil.ignore_patterns(part, "autoencoder.json"))
        shutil.copytree(last, temporary / part)
        note = {"train_seconds": seconds, "steps": stage.steps}
        (temporary / "disback.json").write_text(json.dumps(note, indent=2) + "\n")
        replace_folder(temporary, out)
        log.info(f"pretrain: wrote {out}")
    barrier(run.world)


def main(argv: list[str] | None = None) -> int:
    return run_verb("pretrain", "Trains or fine-tunes a teacher on shards; writes RUN/pipeline.", pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
