"""`disback backtrack`: stage 2, distribution backtracking (DisBack, algorithm 2), and its ablations.

A step is one fake-score update. Every `fake_updates`-th step begins with a generator update:

    captions -> text states -> generator -> x0 -> gradient on x0 (target, fake score) -> generator step
                                            x0.detach() -> fake-score step
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data.reader import Batch
from models.conditioning import Conditioning
from models.ema import Ema
from models.flops import forward_flops
from models.lora import check_targets, is_adapter, load_merged
from models.networks import denoising_loss, generate, predict, predict_guided
from models.objectives import OBJECTIVES, Scores
from models.pipeline import check_pipeline, write_one_step_pipeline
from trainer.command import run_verb
from trainer.distributed import barrier, mean_over_ranks
from trainer.errors import UserError
from trainer.loop import train
from trainer.path import open_path
from trainer.run import Run
from trainer.runstate import WEIGHTS
from trainer.schedules import learning_rate
from trainer.stage import TrainStage
from trainer.target import Target
from trainer.telemetry import Meters, log


class Backtracking(TrainStage):
    def __init__(self, run: Run):
        settings, s = run.settings.backtrack, run.settings
        super().__init__("backtrack", run, settings, images=False)
        if settings.steps % settings.fake_updates:
            raise UserError(
                f"backtrack.steps={settings.steps} is not a multiple of backtrack.fake_updates={settings.fake_updates}: the "
                "last generator update would lack fake-score updates"
            )
        teacher_folder = s.pipeline_folder / "unet"
        if s.lora.rank:
            for folder in {teacher_folder, s.start_folder}:
                check_targets(folder, s.lora)
        path = None
        if settings.path != "none":
            where = (s.path_folder, teacher_folder, s.start_folder)
            path = open_path(*where, s.conditioning_timestep, run.world, s.lora)
        self.sampler = run.sampler(s.pipeline_folder)
        self.schedule, self.timestep = self.sampler.schedule, s.conditioning_timestep
        self.objective = OBJECTIVES[settings.objective]
        far = path.folder(len(path.nodes) - 1) if path else teacher_folder
        log.info(f"fake score starts from {far}")
        # With LoRA every role is an adapter on the weights that it would have had, and a node is an adapter on the
        # teacher's; a target that never moves needs none.
        new = "new" if s.lora.rank else None
        walks = settings.path == "walk"
        self.teacher = self.role("teacher", teacher_folder, settings.teacher_ds_config, None, new if walks else None)
        self.generator = self.role("generator", s.start_folder, settings.generator_ds_config, settings.generator, new)
        fake = (teacher_folder, far if path else new) if new else (far, None)
        self.fake_score = self.role("fake_score", fake[0], settings.fake_score_ds_config, settings.fake_score, fake[1])
        self.target = Target(self.teacher, path if walks else None, settings.walk)
        self.ema = Ema(self.generator.local(), settings.ema)
        self.kept: list[tuple[Tensor, Conditioning]] = []  # the last generator turn's samples, if they are reused
        self.norms: dict[str, float] = {}
        self.flops = self._flops()
        self.identity["teacher"] = self.hash(teacher_folder)
        if path:
            self.identity["far_node"] = path.nodes[-1].sha256

    def _flops(self) -> float:
        """FLOP of an average step and rank: a turn has the generator forward and back, target and fake score forward; a
        fake update is forward and back, and makes its own samples unless it may reuse a turn's."""
        settings = self.settings
        tokens = self.sampler.text.tokens
        forward = forward_flops(self.generator.config, self.sampler.latent_shape, tokens)
        turn = self.trained_passes + (1 if settings.guidance_scale == 1 else 2) + 1
        fresh = 0 if settings.reuse_x0 else settings.fake_updates - 1
        passes = turn + self.trained_passes * settings.fake_updates + fresh
        return forward * passes / settings.fake_updates * self.micro * settings.accumulation

    def update(self, step: int, meters: Meters, until_log: int) -> dict | None:
        settings = self.settings
        self.rates = {
            "generator": learning_rate(settings.generator, step, self.steps),
            "fake_score": learning_rate(settings.fake_score, step, self.steps),
        }
        turn = step % settings.fake_updates == 0
        switched = turn and self.target.move(step // settings.fake_updates)
        mismatches: list[Tensor] = []
        if turn:
            self.kept = []
        for part, batch in enumerate(self.micro_batches(meters)):
            if turn:
                # The last turn before a line is the one whose norm the line shows.
                x0, cond, mismatch = self._generator_turn(step, batch, until_log < settings.fake_updates)
                meters.add("mismatch", mismatch)
                meters.add("sample_spread", _spread(x0))
                mismatches.append(mismatch)
                if settings.reuse_x0:
                    self.kept.append((x0, cond))
            elif settings.reuse_x0:
                x0, cond = self.kept[part]
            else:
                cond = self._encode(batch.captions)
                with torch.no_grad():
                    x0 = self._sample(step, batch, cond)
            t = self.schedule.timesteps(self.noise.uniform("fake t", step, batch.index))
            eps = self.noise.normal("fake eps", step, batch.index, tuple(x0.shape[1:]))
            loss = denoising_loss(self.fake_score, self.schedule, x0, eps, t, cond)
            meters.add("loss/fake_score", loss)
            self._norm("fake_score", self.fake_score.step(loss, self.rates["fake_score"], until_log == 0))
        if turn:
            self.ema.update(self.generator.local())
            self.target.observe(step // settings.fake_updates, torch.stack(mismatches).mean(), self._mean)
        return self.rates_and_target() if switched else None

    def _encode(self, captions: list[str]) -> Conditioning:
        return self.sampler.text.encode(captions, self.sampler.resolution)

    def _sample(self, step: int, batch: Batch, cond: Conditioning) -> Tensor:
        z = self.noise.normal("z", step, batch.index, self.sampler.latent_shape)
        return generate(self.generator, z, cond, self.schedule, self.timestep)

    def _generator_turn(self, step: int, batch: Batch, want_norm: bool) -> tuple[Tensor, Conditioning, Tensor]:
        """The generator's micro-step; returns its samples, detached, their conditioning, and the mismatch on them."""
        settings = self.settings
        cond = self._encode(batch.captions)
        x0 = self._sample(step, batch, cond)
        sample = x0.detach()
        t = self.schedule.timesteps(self.noise.uniform("t", step, batch.index), *settings.timesteps)
        eps = self.noise.normal("eps", step, batch.index, tuple(sample.shape[1:]))
        x_t = self.schedule.add_noise(sample, eps, t)
        with torch.no_grad():
            guided, conditional = predict_guided(self.teacher, x_t, t, cond, settings.guidance_scale)
            fake = predict(self.fake_score, x_t, t, cond)
        # Unguided and unnormalised: how far the fake score is from the target's own distribution.
        mismatch = (conditional - fake).square().mean()
        alpha, sigma = self.schedule.alpha_sigma(t)
        target_x0, fake_x0 = self.schedule.to_x0(guided, x_t, t), self.schedule.to_x0(fake, x_t, t)
        gradient = self.objective(Scores(sample, target_x0, fake_x0, alpha, sigma))
        # The mean over elements of x0 * gradient has gradient / elements as its gradient on x0.
        loss = (x0 * gradient).mean()
        self._norm("generator", self.generator.step(loss, self.rates["generator"], want_norm))
        return sample, cond, mismatch

    def _mean(self, value: Tensor) -> float:
        return float(mean_over_ranks(value, self.world))

    def _norm(self, role: str, norm: float | None) -> None:
        if norm is not None:
            self.norms[f"grad_norm/{role}"] = norm

    def metrics(self) -> dict:
        return super().metrics() | self.norms | self.rates_and_target()

    def rates_and_target(self) -> dict:
        return {f"lr/{role}": rate for role, rate in self.rates.items()} | {"target_node": self.target.node}

    def preview(self) -> Tensor:
        z = self.preview_noise(self.sampler.latent_shape)
        with self.generator.averaged(self.ema):
            return self.grid(self.sampler.one_step(self.generator, self.preview_captions(), z, self.timestep))

    def weights_writer(self) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            with self.generator.averaged(self.ema):
                self.save_weights(self.generator, folder, self.run.dtype)

        return write

    def state_dict(self) -> dict:
        own = {"ema": self.ema.state_dict(), "target": self.target.state_dict(), "kept": self.kept, "norms": self.norms}
        return super().state_dict() | own

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.ema.load_state_dict(state["ema"])
        self.target.load_state_dict(state["target"])
        self.norms = state["norms"]
        device = self.world.device
        self.kept = [(x0.to(device), cond.map(lambda v: v.to(device))) for x0, cond in state["kept"]]

    def begin(self, step: int) -> None:
        super().begin(step)
        # A resumed run holds the node of the last generator turn, which is not announced again.
        self.target.move(max(step - 1, 0) // self.settings.fake_updates)

    def close(self) -> None:
        super().close()
        self.target.close()


def _spread(x0: Tensor) -> Tensor:
    """How much samples [B, C, H, W] differ from each other (from their own mean, if there is but one): a standard
    deviation, a scalar. A generator that collapses makes it small."""
    if len(x0) > 1:
        return (x0 - x0.roll(1, 0)).square().mean().div(2).sqrt()
    return (x0 - x0.mean((2, 3), keepdim=True)).square().mean().sqrt()


def export_generator(run: Run, weights: Path, out: Path, note: dict, merge: bool = True) -> None:
    """Writes a one-step pipeline of a generator's UNet folder, or of its LoRA folder: merged into the UNet that it
    started from, or beside it as `lora/`."""
    source, timestep = run.settings.pipeline_folder, run.settings.conditioning_timestep
    unet, lora, start = weights, None, run.settings.start_folder
    if is_adapter(weights) and merge:

        def unet(folder: Path) -> None:
            load_merged(start, weights, run.dtype).save_pretrained(folder, safe_serialization=True)

    elif is_adapter(weights):
        unet, lora = start, weights
    note = note | {"resolution": run.settings.data.resolution}
    write_one_step_pipeline(source, unet, timestep, out, note, lora)


def backtrack(run: Run) -> None:
    """Distils the generator and writes `generator/`, a pipeline that makes an image in one step."""
    check_pipeline(run.settings.pipeline_folder)
    folder = run.stage_folder("backtrack")
    stage = Backtracking(run)
    seconds = train(stage, run.settings.backtrack.loop, run.settings.health, folder, run.world)
    if run.world.main:
        latest = (folder / "LATEST").read_text().strip()
        note = {"checkpoint": latest, "weights": "ema", "train_seconds": seconds}
        export_generator(run, folder / "checkpoints" / latest / WEIGHTS, run.folder / "generator", note)
        log.info(f"backtrack: {stage.steps} steps in {seconds:.0f} s; wrote {run.folder / 'generator'}")
    barrier(run.world)


def main(argv: list[str] | None = None) -> int:
    return run_verb("backtrack", "Stage 2: distils a one-step generator along the path.", backtrack, argv)


if __name__ == "__main__":
    sys.exit(main())
