"""`disback backtrack`: stage 2, distribution backtracking (DisBack, algorithm 2), and its ablations.

A step is one fake-score update. Every `fake_updates`-th step begins with a generator update:

    captions -> text states -> generator -> x0 -> gradient on x0 (target, fake score) -> generator step
                                            x0.detach() -> fake-score step
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from data.loader import Batch
from models.conditioning import Conditioning
from models.denoise import denoising_loss, predict, predict_guided
from models.gan import Discriminator, feature_module
from models.image_metrics import spread
from models.multistep import Student
from models.noise import Draws
from models.objectives import OBJECTIVES, Scores
from models.pipeline import empty_network
from trainer.checkpoint.directory import RAW, WEIGHTS, CheckpointDirectory
from trainer.config.deepspeed import check_split
from trainer.distributed.logs import log
from trainer.distributed.world import barrier
from trainer.engine.save_weights import Snapshot
from trainer.entry import exit_with, run_verb
from trainer.export import export_generator
from trainer.path.manifest import DegradationPath, open_path
from trainer.path.target import Target
from trainer.planner.flops import backtrack_flops
from trainer.training.gan_term import GanTerm
from trainer.training.loop import train
from trainer.training.run import Run
from trainer.training.stage import DenoiserStage
from trainer.training.state_parts import ReusedSamples, WeightAverage


class Backtracking(DenoiserStage):
    """Distils the generator toward the nodes of the path, in reverse order, ending at the teacher. The step comes first;
    how the roles are built follows below."""

    def update(self, step: int) -> None:
        generator_update, rest = divmod(step, self.settings.fake_updates)
        rates, mismatches = self.rates(step), []
        if rest == 0:
            self.target.move(generator_update)
            self.reused.clear()
        for micro_step, batch in enumerate(self.micro_batches()):
            draws = self.noise.at(step, batch.index)
            if rest and self.settings.reuse_x0:
                x0, cond = self.reused[micro_step]
                real_cond = self.encode(batch) if self.gan else cond  # the samples have an earlier batch's captions
            else:
                cond = real_cond = self.encode(batch)
                if rest:
                    with torch.no_grad():
                        x0 = self.sample(cond, draws, self.latent_shape(batch))
                else:
                    x0, mismatch = self.update_generator(cond, draws, self.latent_shape(batch), rates["generator"])
                    mismatches.append(mismatch)
            self.update_fake_score(x0, cond, batch, real_cond, draws, rates["fake_score"])
        if rest == 0:
            self.average.update(generator_update)
            self.target.observe(generator_update, torch.stack(mismatches).mean())

    def update_generator(
        self, cond: Conditioning, draws: Draws, shape: tuple[int, int, int], rate: float
    ) -> tuple[Tensor, Tensor]:
        """A micro-batch of the generator's update, in `generator_split` pieces; returns its samples, detached, and the
        mismatch on them."""
        size, samples, mismatches = self.micro // self.settings.generator_split, [], []
        for rows in (slice(low, low + size) for low in range(0, self.micro, size)):
            piece = cond.map(lambda value, rows=rows: value[rows])
            x0 = self.sample(piece, draws.rows(rows), shape)
            gradient, mismatch = self.gradient_on_x0(x0.detach(), piece, draws.rows(rows))
            # mean(x0 * gradient) has gradient / elements as its gradient on x0.
            self.generator.step((x0 * gradient).mean(), rate)
            samples.append(x0.detach())
            mismatches.append(mismatch)
        x0, mismatch = torch.cat(samples), torch.stack(mismatches).mean()
        self.meters.add("mismatch", mismatch)
        self.meters.add("sample_spread", spread(x0))
        if self.settings.reuse_x0:
            self.reused.append(x0, cond)
        return x0, mismatch

    def sample(self, cond: Conditioning, draws: Draws, shape: tuple[int, int, int]) -> Tensor:
        """x0 [B, *shape] of the generator, at its one step or at a random one of several."""
        return self.student.training_sample(self.generator, cond, draws, shape)

    def gradient_on_x0(self, x0: Tensor, cond: Conditioning, draws: Draws) -> tuple[Tensor, Tensor]:
        """The gradient on x0 [B, C, h, w], and the mismatch between target and fake score, a scalar."""
        t = self.schedule.timesteps(draws.uniform("t"), *self.settings.timesteps)
        eps = draws.normal("eps", tuple(x0.shape[1:]))
        x_t = self.schedule.add_noise(x0, eps, t)
        with torch.no_grad():
            guidance = self.settings.guidance_scale, self.settings.guidance_batch
            guided, unguided = predict_guided(self.teacher, x_t, t, cond, *guidance)
        if self.gan:
            fake, gan_gradient, gan_loss = self.gan.generator_term(x0, eps, t, cond, draws)
            self.meters.add("loss/gan_generator", gan_loss)
        else:
            with torch.no_grad():
                fake = predict(self.fake_score, x_t, t, cond)
        alpha, sigma = self.schedule.alpha_sigma(t)
        target_x0, fake_x0 = self.schedule.to_x0(guided, x_t, t), self.schedule.to_x0(fake, x_t, t)
        gradient = self.objective(Scores(x0, target_x0, fake_x0, alpha, sigma))
        # Unguided and unnormalised: how far the fake score is from the target's own distribution.
        mismatch = (unguided - fake).square().mean()
        return (gradient + gan_gradient if self.gan else gradient), mismatch

    def update_fake_score(
        self, x0: Tensor, cond: Conditioning, real: Batch, real_cond: Conditioning, draws: Draws, rate: float
    ) -> None:
        """A micro-batch of the fake score's update: denoising of generated samples x0 and, with the GAN term, the head's
        loss on them and on real ones."""
        t = self.schedule.timesteps(draws.uniform("fake t"))
        eps = draws.normal("fake eps", tuple(x0.shape[1:]))
        if self.gan:
            denoising, head = self.gan.fake_score_losses(x0, eps, t, cond, real, real_cond, draws)
            self.meters.add("loss/gan_head", head)
            loss = denoising + self.gan.settings.head_weight * head
        else:
            loss = denoising = denoising_loss(self.fake_score, self.schedule, x0, eps, t, cond)
        self.meters.add("loss/fake_score", denoising)
        # 1 is the loss of a network that predicts zero.
        self.meters.add("fake_score_error", denoising.detach() / self.schedule.target(x0, eps, t).square().mean())
        self.fake_score.step(loss, rate)

    def __init__(self, run: Run):
        run_settings, settings = run.settings, run.settings.backtrack
        check(run)
        teacher, path = run.weights_hash(run.teacher_folder), None
        if settings.path != "none":
            hashes, timesteps = (teacher, run.weights_hash(run.start_folder)), run_settings.student_timesteps
            about = hashes, timesteps, run.world, run_settings.lora, run.digest
            path = open_path(run_settings.path_folder, run.teacher_folder, *about)
        gan = run_settings.gan
        super().__init__("backtrack", run, settings, images=gan.enabled, pipeline=run.pipeline_folder)
        self.update_every = {"generator": settings.fake_updates}
        self.student = Student(self.schedule, run_settings.student_timesteps)
        self.objective = OBJECTIVES[settings.objective]
        self._build_roles(path)
        self.gan = GanTerm(gan, self.fake_score, self.sampler) if gan.enabled else None
        self.target = Target(self.teacher, path if settings.path == "walk" else None, settings.walk)
        self.average = WeightAverage(self.generator, settings.ema, settings.ema_warmup)
        self.reused = ReusedSamples(self.world, self.split, self.sampler.text.family.name)
        self.parts |= {"ema": self.average, "target": self.target, "reused": self.reused}
        self.count_flops(backtrack_flops, self.generator, gan.enabled)
        self.identity |= {"teacher": teacher, "timesteps": list(self.student.timesteps)}
        self.identity |= {f"gan.{k}": v for k, v in gan.model_dump(mode="json").items()}
        if path:
            self.identity["far_node"] = path.nodes[-1].sha256

    def _build_roles(self, path: DegradationPath | None) -> None:
        """Teacher, generator and fake score. With LoRA every role is an adapter on the weights that it would otherwise
        have, and a node is an adapter on the teacher's; a target that never moves needs none."""
        run, settings = self.run, self.settings
        far = path.folder(len(path.nodes) - 1) if path else run.teacher_folder
        log.info(f"fake score starts from {far}")
        target_adapter = generator_adapter = fake_adapter = None
        fake_folder = far
        if run.settings.lora.rank:
            target_adapter = "new" if settings.path == "walk" else None
            generator_adapter, fake_adapter = "new", far if path else "new"
            fake_folder = run.teacher_folder
        with_head = None
        if run.settings.gan.enabled:
            # The head halves features as often as the shorter side of the smallest bucket allows, and takes any larger ones.
            shape = tuple(min(sides) for sides in zip(*map(self.sampler.shape_of, self.dataset.shapes), strict=True))
            with_head = partial(Discriminator, latent_shape=shape, seed=run.settings.seed)
        self.teacher = self.add_role(
            self.builder.build("teacher", run.teacher_folder, settings.teacher_ds_config, adapter=target_adapter)
        )
        self.generator = self.add_role(
            self.builder.build(
                "generator",
                run.start_folder,
                settings.generator_ds_config,
                settings.generator,
                split=settings.generator_split,
                adapter=generator_adapter,
            )
        )
        self.fake_score = self.add_role(
            self.builder.build(
                "fake_score",
                fake_folder,
                settings.fake_score_ds_config,
                settings.fake_score,
                wrap=with_head,
                adapter=fake_adapter,
            )
        )

    @property
    def read_every(self) -> int:
        """Between generator updates, reused samples need no captions; the GAN term needs images."""
        reuses = self.settings.reuse_x0 and not self.run.settings.gan.enabled
        return self.settings.fake_updates if reuses else 1

    def begin(self, step: int) -> None:
        super().begin(step)
        # A resumed run holds the node of the last generator update.
        self.target.move(max(step - 1, 0) // self.settings.fake_updates)

    def announces(self, step: int) -> bool:
        """The first step and every target switch of a walk."""
        generator_update, rest = divmod(step, self.settings.fake_updates)
        return rest == 0 and self.target.switches_at(generator_update)

    def host_values(self, step: int) -> dict:
        return super().host_values(step) | {"target_node": self.target.node}

    def preview(self) -> Tensor:
        with self.average.applied():
            return self.grid(partial(self.sampler.generator_images, self.generator, timesteps=self.student.timesteps))

    def snapshots(self) -> dict[str, Callable[[], Snapshot | None]]:
        found = {WEIGHTS: self.average.snapshot}
        if self.settings.save_raw:
            found[RAW] = lambda: self.generator.snapshot(self.generator.masters.local(), torch.float32)
        return found

    def close(self) -> None:
        super().close()
        self.target.close()


def check(run: Run) -> None:
    """Refuses what would fail later, before anything is loaded. Raises UserError, ModelError."""
    settings = run.settings.backtrack
    check_split(settings.generator_split, settings.batch, settings.accumulation, run.world.size)
    if run.settings.gan.enabled:
        feature_module(empty_network(run.teacher_folder))
    run.check_lora(run.teacher_folder, run.start_folder)


def backtrack(run: Run) -> None:
    """Distils the generator and writes `generator/`, a pipeline that makes an image in one step or in the generator's
    several."""
    run.require_pipeline()
    with run.training("backtrack") as folder:
        stage = Backtracking(run)
        seconds = train(stage, run.settings.backtrack.loop, run.settings.health, folder, run.world)
        if run.world.main:
            checkpoints = CheckpointDirectory(folder)
            note = {"checkpoint": checkpoints.latest(), "weights": "ema", "train_seconds": seconds}
            export_generator(run, checkpoints.latest_weights(), run.folder / "generator", note)
            log.info(f"backtrack: {stage.steps} steps in {seconds:.0f} s; wrote {run.folder / 'generator'}")
        barrier(run.world)


def main(argv: list[str] | None = None) -> int:
    return run_verb("backtrack", "Stage 2: distils a one-step generator along the path.", backtrack, argv)


if __name__ == "__main__":
    exit_with(main)
