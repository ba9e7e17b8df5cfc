"""`disback backtrack`: stage 2, distribution backtracking (DisBack, algorithm 2), and its ablations.

A step is one fake-score update. Every `fake_updates`-th step begins with a generator update:

    captions -> text states -> generator -> x0 -> gradient on x0 (target, fake score) -> generator step
                                            x0.detach() -> fake-score step
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from data.reader import Batch
from data.sampling_order import Split
from models.conditioning import Conditioning
from models.denoise import denoising_loss, predict, predict_guided
from models.ema import Ema
from models.gan import Discriminator, feature_module
from models.metrics import spread
from models.multistep import Student
from models.objectives import OBJECTIVES, Scores
from models.pipeline import empty_network
from models.profile_flops import forward_flops, judging_flops
from trainer.checkpoint.directory import WEIGHTS
from trainer.checkpoint.reshard_state import redeal
from trainer.distributed.logs import log
from trainer.distributed.world import barrier, mean_over_ranks
from trainer.engine.optimizer import learning_rate
from trainer.entry import run_verb
from trainer.errors import UserError
from trainer.export import export_generator
from trainer.path.manifest import open_path
from trainer.path.target import Target, merge_walks
from trainer.planner.flops import step_flops, trained_pass
from trainer.training.gan import Adversary
from trainer.training.loop import train
from trainer.training.metrics import Meters
from trainer.training.run import Run
from trainer.training.stage import TrainStage


class Backtracking(TrainStage):
    def __init__(self, run: Run):
        settings, s = run.settings.backtrack, run.settings
        super().__init__("backtrack", run, settings, images=s.gan.enabled, pipeline=run.pipeline_folder)
        if settings.steps % settings.fake_updates:
            raise UserError(
                f"backtrack.steps={settings.steps} is not a multiple of backtrack.fake_updates={settings.fake_updates}: the "
                "last generator update would lack fake-score updates"
            )
        if self.micro % settings.generator_split:
            fits = ", ".join(str(n) for n in range(1, self.micro + 1) if self.micro % n == 0)
            raise UserError(
                f"backtrack.generator_split={settings.generator_split} does not divide the micro-batch of {self.micro} "
                f"(batch {settings.batch} over {run.world.size} processes x {settings.accumulation} accumulation steps): "
                f"use one of {fits}"
            )
        if s.gan.enabled:
            feature_module(empty_network(run.teacher_folder))  # a network that the head cannot read is refused at once
        self.check_lora(run.teacher_folder, run.start_folder)
        path = None
        if settings.path != "none":
            hashes = self.hash(run.teacher_folder), self.hash(run.start_folder)
            path = open_path(s.path_folder, run.teacher_folder, hashes, s.student_timesteps, run.world, s.lora)
        if settings.reuse_x0 and not s.gan.enabled:
            self.read_every = settings.fake_updates  # between generator turns nobody asks for captions
        self.sampler = self.open_sampler(run.pipeline_folder)
        self.schedule = self.sampler.schedule
        self.student = Student(self.schedule, s.student_timesteps)
        self.objective = OBJECTIVES[settings.objective]
        far = path.folder(len(path.nodes) - 1) if path else run.teacher_folder
        log.info(f"fake score starts from {far}")
        # With LoRA every role is an adapter on the weights that it would have had, and a node is an adapter on the
        # teacher's; a target that never moves needs none.
        new = "new" if s.lora.rank else None
        walks = settings.path == "walk"
        self.teacher = self.role(
            "teacher", run.teacher_folder, settings.teacher_ds_config, adapter=new if walks else None
        )
        self.generator = self.role(
            "generator",
            run.start_folder,
            settings.generator_ds_config,
            settings.generator,
            settings.generator_split,
            adapter=new,
        )
        below, adapter = (run.teacher_folder, far if path else new) if new else (far, None)
        self.fake_score = self.role(
            "fake_score",
            below,
            settings.fake_score_ds_config,
            settings.fake_score,
            wrap=self._with_head if s.gan.enabled else None,
            adapter=adapter,
        )
        self.gan = Adversary(s.gan, self.fake_score, self.sampler, self.noise) if s.gan.enabled else None
        self.target = Target(self.teacher, path if walks else None, settings.walk)
        self.ema = Ema(self.generator.local(), settings.ema)
        self.kept: list[tuple[Tensor, Conditioning]] = []  # the last generator turn's samples, if they are reused
        self.norms: dict[str, float] = {}
        self.flops = self._flops()
        self.identity["teacher"] = self.hash(run.teacher_folder)
        if path:
            self.identity["far_node"] = path.nodes[-1].sha256
        self.identity["timesteps"] = list(self.student.timesteps)
        self.identity |= {f"gan.{k}": v for k, v in s.gan.model_dump(mode="json").items()}

    def _with_head(self, network: nn.Module) -> nn.Module:
        return Discriminator(network, self.sampler.latent_shape, self.run.settings.seed)

    def _flops(self) -> float:
        """FLOP of an average step and rank."""
        about = self.generator.config, self.sampler.latent_shape, self.sampler.text.tokens
        judging = judging_flops(*about) if self.gan else ()
        s = self.run.settings
        sample = step_flops(self.settings, s.gan, trained_pass(s.lora), forward_flops(*about), *judging)
        return sample * self.micro * self.settings.accumulation

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
                x0, cond, mismatch = self._generator_turn(step, batch, meters, until_log < settings.fake_updates)
                meters.add("mismatch", mismatch)
                meters.add("sample_spread", spread(x0))
                mismatches.append(mismatch)
                if settings.reuse_x0:
                    self.kept.append((x0, cond))
            elif settings.reuse_x0:
                x0, cond = self.kept[part]
            else:
                cond = self.encode(batch.captions, batch.cached)
                with torch.no_grad():
                    x0 = self._sample(step, batch.index, cond)
            loss = self._fake_score_loss(step, batch, x0, cond, meters)
            self._norm("fake_score", self.fake_score.step(loss, self.rates["fake_score"], until_log == 0))
        if turn:
            self.ema.update(self.generator.local())
            self.target.observe(step // settings.fake_updates, torch.stack(mismatches).mean(), self._mean)
        return self.rates_and_target() if switched else None

    def _sample(self, step: int, index: list[int], cond: Conditioning) -> Tensor:
        shape = self.sampler.latent_shape
        return self.student.training_sample(self.generator, cond, self.noise, step, index, shape)

    def _fake_score_loss(self, step: int, batch: Batch, x0: Tensor, cond: Conditioning, meters: Meters) -> Tensor:
        t = self.schedule.timesteps(self.noise.uniform("fake t", step, batch.index))
        eps = self.noise.normal("fake eps", step, batch.index, tuple(x0.shape[1:]))
        if self.gan:
            reused = self.settings.reuse_x0 and step % self.settings.fake_updates
            # Reused samples have an earlier batch's captions.
            real_cond = self.encode(batch.captions, batch.cached) if reused else cond
            return self.gan.update_loss(x0, eps, t, cond, real_cond, step, batch, meters)
        loss = denoising_loss(self.fake_score, self.schedule, x0, eps, t, cond)
        meters.add("loss/fake_score", loss)
        return loss

    def _generator_turn(
        self, step: int, batch: Batch, meters: Meters, want_norm: bool
    ) -> tuple[Tensor, Conditioning, Tensor]:
        """The generator's micro-step, in `generator_split` pieces; returns its samples, detached, their conditioning, and
        the mismatch on them."""
        # Whole: the last bit of a fresh text state depends on its batch.
        cond = self.encode(batch.captions, batch.cached)
        size, parts = self.micro // self.settings.generator_split, []
        for rows in (slice(low, low + size) for low in range(0, self.micro, size)):
            piece = cond.map(lambda v, rows=rows: v[rows])
            parts.append(self._generator_step(step, batch.index[rows], piece, meters, want_norm))
        samples, mismatches = zip(*parts, strict=True)
        return torch.cat(samples), cond, torch.stack(mismatches).mean()

    def _generator_step(
        self, step: int, index: list[int], cond: Conditioning, meters: Meters, want_norm: bool
    ) -> tuple[Tensor, Tensor]:
        settings = self.settings
        x0 = self._sample(step, index, cond)
        sample = x0.detach()
        t = self.schedule.timesteps(self.noise.uniform("t", step, index), *settings.timesteps)
        eps = self.noise.normal("eps", step, index, tuple(sample.shape[1:]))
        x_t = self.schedule.add_noise(sample, eps, t)
        with torch.no_grad():
            guidance = settings.guidance_scale, settings.guidance_batch
            guided, conditional = predict_guided(self.teacher, x_t, t, cond, *guidance)
            if not self.gan:
                fake = predict(self.fake_score, x_t, t, cond)
        if self.gan:
            fake, push, loss = self.gan.push(sample, eps, t, cond, step, index)
            meters.add("loss/gan_generator", loss)
        # Unguided and unnormalised: how far the fake score is from the target's own distribution.
        mismatch = (conditional - fake).square().mean()
        alpha, sigma = self.schedule.alpha_sigma(t)
        target_x0, fake_x0 = self.schedule.to_x0(guided, x_t, t), self.schedule.to_x0(fake, x_t, t)
        gradient = self.objective(Scores(sample, target_x0, fake_x0, alpha, sigma))
        if self.gan:
            gradient = gradient + push
        # The mean over elements of x0 * gradient has gradient / elements as its gradient on x0.
        loss = (x0 * gradient).mean()
        self._norm("generator", self.generator.step(loss, self.rates["generator"], want_norm))
        return sample, mismatch

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
        with self.generator.averaged(self.ema):
            return self.preview_grid(
                lambda captions, noise: self.sampler.student(self.generator, captions, noise, self.student.timesteps)
            )

    def weights_writer(self) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            state = self.generator.state_dict(self.ema, self.run.dtype)
            if state is not None:
                self.saver(self.generator)(state, folder=folder)

        return write

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "ema": self.average_state(self.ema, self.generator),
            "target": self.target.state_dict(),
            "kept": [{"x0": x0, **cond.tensors()} for x0, cond in self.kept],
            "norms": self.norms,
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.ema.load_state_dict(state["ema"])
        self.target.load_state_dict(state["target"])
        self.norms = state["norms"]
        device = self.world.device
        kept = [{key: value.to(device) for key, value in part.items()} for part in state["kept"]]
        family = self.sampler.text.family.name
        self.kept = [(part.pop("x0"), Conditioning(**part, family=family)) for part in kept]

    def regroup(self, states: list[dict], saved: Split) -> dict:
        return super().regroup(states, saved) | {
            "ema": self.regroup_average([s["ema"] for s in states], self.ema, self.generator),
            "target": merge_walks([s["target"] for s in states]),
            # The generator that made them is gone: the samples themselves go to the ranks that have their rows now.
            "kept": redeal([s["kept"] for s in states], saved, self.split, self.world.rank),
        }

    def begin(self, step: int) -> None:
        super().begin(step)
        # A resumed run holds the node of the last generator turn, which is not announced again.
        self.target.move(max(step - 1, 0) // self.settings.fake_updates)

    def close(self) -> None:
        super().close()
        self.target.close()


def backtrack(run: Run) -> None:
    """Distils the generator and writes `generator/`, a pipeline that makes an image in one step or the student's."""
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
