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
from models.networks import denoising_loss, generate, predict, predict_guided
from models.objectives import OBJECTIVES, Scores
from models.pipeline import weights_hash, write_one_step_pipeline
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
from trainer.weights import save_folder


class Backtracking(TrainStage):
    def __init__(self, run: Run):
        settings, s = run.settings.backtrack, run.settings
        super().__init__("backtrack", run, settings, images=False)
        if settings.steps % settings.fake_updates:
            raise UserError(
                f"backtrack.steps={settings.steps} is not a multiple of backtrack.fake_updates={settings.fake_updates}: the "
                "last generator update would lack fake-score updates"
            )
        path = None
        if settings.path != "none":
            folders = s.path_folder, run.teacher_folder, run.start_folder
            path = open_path(*folders, s.conditioning_timestep, run.world, s.variant)
        self.sampler = run.sampler(run.pipeline_folder)
        self.schedule, self.timestep = self.sampler.schedule, s.conditioning_timestep
        self.objective = OBJECTIVES[settings.objective]
        far = path.folder(len(path.nodes) - 1) if path else run.teacher_folder
        log.info(f"fake score starts from {far}")
        self.teacher = self.role("teacher", run.teacher_folder, settings.teacher_ds_config)
        self.generator = self.role("generator", run.start_folder, settings.generator_ds_config, settings.generator)
        self.fake_score = self.role("fake_score", far, settings.fake_score_ds_config, settings.fake_score)
        self.target = Target(self.teacher, path if settings.path == "walk" else None, settings.walk)
        self.ema = Ema(self.generator.local(), settings.ema)
        self.kept: list[tuple[Tensor, Conditioning]] = []  # the last generator turn's samples, if they are reused
        self.norms: dict[str, float] = {}
        self.flops = self._flops()
        self.identity["teacher"] = weights_hash(run.teacher_folder, s.variant)
        if path:
            self.identity["far_node"] = path.nodes[-1].sha256

    def _flops(self) -> float:
        """FLOP of an average step and rank: a turn has the generator forward and back (3), target and fake score
        forward; a fake update is forward and back (3), and makes its own samples unless it may reuse a turn's."""
        settings = self.settings
        tokens = self.sampler.text.tokens
        forward = forward_flops(self.generator.config, self.sampler.latent_shape, tokens)
        turn = 3 + (1 if settings.guidance_scale == 1 else 2) + 1
        fresh = 0 if settings.reuse_x0 else settings.fake_updates - 1
        passes = turn + 3 * settings.fake_updates + fresh
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
                state = self.generator.state_dict()
            if state is not None:
                save_folder(state, self.generator.config, folder, self.run.dtype)

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


def export_generator(run: Run, weights: Path, out: Path, note: dict) -> None:
    """Writes a one-step pipeline of a generator's weights folder."""
    s = run.settings
    note = note | {"resolution": s.data.resolution}
    write_one_step_pipeline(run.pipeline_folder, weights, s.conditioning_timestep, out, note, s.variant)


def backtrack(run: Run) -> None:
    """Distils the generator and writes `generator/`, a pipeline that makes an image in one step."""
    run.require_pipeline()
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
