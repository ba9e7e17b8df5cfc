"""One run: the path, if the method has one, then distillation, with scores along the way. The product's loop is
trainer/backtrack.py; this one keeps everything in memory and knows more variants."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.convergence.diagnostics import Diagnostics
from benchmarks.convergence.gradient import SampleGradient
from benchmarks.convergence.optimize import Trained
from benchmarks.convergence.path import Target, put, record, weights
from benchmarks.convergence.problem import BATCH, Problem
from benchmarks.convergence.recipes import Recipe
from models.image_metrics import spread
from models.noise import Draws
from trainer.config.schema import OptimizerSettings


class Distillation:
    """The three roles, and the generator's update and the fake score's."""

    def __init__(self, problem: Problem, recipe: Recipe, seed: int):
        self.problem, self.recipe, self.seed = problem, recipe, seed
        generator = problem.new_generator(recipe.start, seed)
        nodes = record(problem, recipe, generator, seed) if recipe.records else []
        self.network = copy.deepcopy(problem.teacher)  # of the fake score, without a head
        if nodes and recipe.method != "none":
            put(self.network, nodes[-1])
        fake = problem.discriminator(self.network, seed) if recipe.has_head else self.network
        rule = {"betas": recipe.betas}
        settings = OptimizerSettings(lr=recipe.lr, decay=recipe.decay, **rule)
        self.generator = Trained(generator, settings, recipe.updates)
        self.fake = Trained(fake, OptimizerSettings(lr=recipe.fake_lr, **rule), recipe.updates * recipe.fake_updates)
        self.target = Target(problem, recipe, nodes)
        self.gradient = SampleGradient(problem, recipe, self.target, fake)
        self.noise = problem.noise(seed, "backtrack")
        self.average = weights(generator)
        self.diagnostics = Diagnostics(problem, recipe, seed) if recipe.refit else None

    def step(self, step: int) -> None:
        """One fake-score update, and before every `fake_updates`-th a generator update."""
        problem, recipe = self.problem, self.recipe
        update, rest = divmod(step, recipe.fake_updates)
        draws, cond = self.noise.at(step, list(range(BATCH))), problem.conditioning(self.seed, step)
        if rest:
            with torch.no_grad():
                x0 = problem.generate(self.generator.net, cond, draws, recipe)
        else:
            self.target.move(update, self.network)
            x0 = problem.generate(self.generator.net, cond, draws, recipe)
            gradient = self.gradient(x0.detach(), cond, draws, update)
            self.generator.step((x0 * gradient).mean(), update)
            x0 = x0.detach()
        loss, denoising = self._fake_loss(x0, cond, draws, step)
        self.fake.step(loss, step)
        if rest == 0:
            self._after_generator_update(update)
            if self.diagnostics:
                self.diagnostics.add(
                    mismatch=self.gradient.mismatch, fake_loss=float(denoising), spread=float(spread(x0))
                )

    def _fake_loss(self, x0: Tensor, cond: object, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        """The fake score's loss, and the denoising part of it."""
        problem, recipe = self.problem, self.recipe
        level, eps = problem.levels(draws.uniform("fake t"), narrow=False), draws.normal("fake eps", problem.shape)
        own = cond if recipe.fake_text else problem.without_text(cond)
        if not recipe.has_head:
            loss = problem.loss(self.fake.net, x0, eps, level, own)
            return loss, loss.detach()
        denoising, head = problem.losses_with_head(self.fake.net, x0, eps, level, own, draws, (self.seed, step))
        return denoising + recipe.head * head, denoising.detach()

    @torch.no_grad()
    def _after_generator_update(self, update: int) -> None:
        decay = min(self.recipe.ema, (update + 1) / (update + 10)) if self.recipe.ema_warmup else self.recipe.ema
        for average, p in zip(self.average, self.generator.net.parameters(), strict=True):
            average.lerp_(p, 1 - decay)
        if self.recipe.ida:
            for fake, p in zip(self.network.parameters(), self.generator.net.parameters(), strict=True):
                fake.lerp_(p, self.recipe.ida)

    def diagnosed(self, update: int) -> dict[str, float]:
        """The diagnostics since the last call, if the recipe wants some."""
        return self.diagnostics.read(self.generator.net, self.gradient, update) if self.diagnostics else {}


def distil(problem: Problem, recipe: Recipe, seed: int, points: int) -> Iterator[dict]:
    """Trains and yields {"compute": ..., metrics} of the averaged generator at `points` equal shares of the budget, and at
    compute 0 of the untrained one."""
    run, shown = Distillation(problem, recipe, seed), copy.deepcopy(problem.new_generator(recipe.start, seed)).eval()
    yield {"compute": 0, **problem.score(shown, recipe)}
    marks = [recipe.budget * (i + 1) / points for i in range(points)]
    for update in range(recipe.updates):
        for step in range(update * recipe.fake_updates, (update + 1) * recipe.fake_updates):
            run.step(step)
        compute = recipe.recording_cost + (update + 1) * recipe.update_cost
        if marks and (compute + recipe.update_cost > marks[0] or update + 1 == recipe.updates):
            while marks and compute + recipe.update_cost > marks[0]:
                marks.pop(0)
            put(shown, run.average)
            yield {"compute": compute, **problem.score(shown, recipe), **run.diagnosed(update)}
