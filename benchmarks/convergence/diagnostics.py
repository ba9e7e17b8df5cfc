"""What could tell during training that it goes wrong: measured along a run, and compared with what the scores do next."""

import copy
import math
import statistics
from collections.abc import Iterable

import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn.functional import cosine_similarity

from benchmarks.convergence.gradient import SampleGradient
from benchmarks.convergence.optimize import Trained
from benchmarks.convergence.problem import BATCH, Problem
from benchmarks.convergence.recipes import Recipe
from trainer.config.schema import OptimizerSettings

NAMES = {
    "fake_loss": "the fake score's loss on fresh samples",
    "lag": "the same as a multiple of its lowest so far",
    "mismatch": "mismatch of target and fake score",
    "rise": "the same as a multiple of its lowest so far",
    "excess": "the fake score's loss less that of the better fitted one, as a share of the latter",
    "cosine": "cosine of the gradient to a better fitted fake score's",
    "spread": "spread of the samples",
    "fall": "the same as a share of its highest so far",
}


class Diagnostics:
    """Means over the generator updates since the last point, and what a better fitted fake score would say there. It draws
    its own noise: training is the same with it and without."""

    def __init__(self, problem: Problem, recipe: Recipe, seed: int):
        self.problem, self.recipe, self.seed = problem, recipe, seed
        self.seen: list[dict[str, float]] = []
        self.noise = problem.noise(seed, "refit")

    def add(self, **values: float) -> None:
        self.seen.append(values)

    def read(self, generator: nn.Module, gradient: SampleGradient, update: int) -> dict[str, float]:
        means = {name: statistics.fmean(values[name] for values in self.seen) for name in self.seen[0]}
        self.seen.clear()
        return means | self._against_a_better_one(generator, gradient, update)

    def _against_a_better_one(self, generator: nn.Module, gradient: SampleGradient, update: int) -> dict[str, float]:
        """A copy of the fake score takes `refit` recording steps on samples of the generator as it is: the cosine of both gradients,
        a mean over fresh samples, and how much lower its loss is on them."""
        problem, recipe = self.problem, self.recipe
        settings = OptimizerSettings(lr=recipe.record_lr)
        better = Trained(copy.deepcopy(gradient.fake), settings, recipe.refit)
        for k in range(recipe.refit + 1):
            draws = self.noise.at(update * 1000 + k, list(range(BATCH)))
            cond = problem.conditioning(self.seed, update * 1000 + k)
            with torch.no_grad():
                x0 = problem.generate(generator, cond, draws, recipe)
            level, eps = problem.levels(draws.uniform("fake t"), narrow=False), draws.normal("fake eps", problem.shape)
            if k < recipe.refit:
                better.step(problem.loss(better.net, x0, eps, level, cond), k)
        other = SampleGradient(problem, recipe, gradient.target, better.net)
        found = [each(x0.clone(), cond, draws, update).detach().flatten(1) for each in (gradient, other)]
        with torch.no_grad():
            own, fitted = (float(problem.loss(net, x0, eps, level, cond)) for net in (gradient.fake, better.net))
        return {"cosine": float(cosine_similarity(*found).mean()), "excess": own / fitted - 1}


def with_ratios(points: list[dict]) -> list[dict]:
    """The points with diagnostics, with those that compare with earlier ones."""
    points, found = [point for point in points if "cosine" in point], []
    for index, point in enumerate(points):
        fake_loss, mismatch = (min(p[name] for p in points[: index + 1]) for name in ("fake_loss", "mismatch"))
        fall = point["spread"] / max(p["spread"] for p in points[: index + 1])
        ratios = {"lag": point["fake_loss"] / fake_loss, "rise": point["mismatch"] / mismatch, "fall": fall}
        found.append(point | ratios)
    return found


def predictions(runs: list[list[dict]], metrics: tuple[str, ...]) -> dict[str, list[float]]:
    """Rank correlations (Spearman) of each diagnostic over all runs: with the change of each metric from its point to the
    next, as a ratio, by itself at each point and then averaged, since both depend on how far a run is; and of its value at
    half of a run with each metric at the run's end."""
    curves = [curve for points in runs if (curve := with_ratios(points))]
    steps = [[(points[k], points[k + 1]) for points in curves] for k in range(min(map(len, curves)) - 1)]
    middles = [(points[len(points) // 2 - 1], points[-1]) for points in curves]
    found = {}
    for name in NAMES:
        ahead = [
            _mean(_rank([a[name] for a, _ in step], [b[m] / a[m] for a, b in step]) for step in steps) for m in metrics
        ]
        end = [_rank([a[name] for a, _ in middles], [b[m] for _, b in middles]) for m in metrics]
        found[name] = ahead + end
    return found


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def _rank(values: list[float], outcomes: list[float]) -> float:
    if min(len(set(values)), len(set(outcomes))) < 2:
        return math.nan
    return float(spearmanr(values, outcomes).statistic)
