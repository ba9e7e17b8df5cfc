"""The gradient on the generator's samples: an objective of the product, or one of the variants that the study compares with it."""

import torch
from torch import Tensor, nn

from benchmarks.convergence.path import Target, falling
from benchmarks.convergence.problem import Problem
from benchmarks.convergence.recipes import Recipe
from models.gan import generator_gradient
from models.noise import Draws
from models.objectives import OBJECTIVES, Scores

EASING = 0.5  # share of the run over which the guidance reaches its scale
RATIOS = (0.1, 20.0)  # range that the density ratio is clamped to


class SampleGradient:
    """fake: the fake score, a Discriminator if the recipe has a head. mismatch: mean squared difference of the last call's
    unguided noise estimates."""

    def __init__(self, problem: Problem, recipe: Recipe, target: Target, fake: nn.Module):
        self.problem, self.recipe, self.target, self.fake = problem, recipe, target, fake
        self.mismatch = 0.0

    def __call__(self, x0: Tensor, cond: object, draws: Draws, update: int) -> Tensor:
        """The gradient on x0 [B, *shape]."""
        problem, recipe, level = self.problem, self.recipe, self._level(draws, update)
        eps = draws.normal("eps", problem.shape)
        if recipe.objective == "sid":
            return self._sid(x0, eps, level, cond)
        leaf = x0.detach().requires_grad_(recipe.has_head)
        x_t, alpha, sigma = problem.noised(leaf, eps, level)
        guidance = 1.0 if recipe.apart else self._guidance(update)
        with torch.no_grad():
            target, plain = problem.estimates(self.target.net, x_t, level, cond, guidance)
            if recipe.node_guidance:
                target = self._from_node(target, x_t, level, cond)
        fake, logits = self._fake(x_t, level, cond)
        self.mismatch = float(((plain - fake) * alpha / sigma).square().mean())
        if recipe.objective == "difference":  # Diff-Instruct's released loss, in pixel space: a weight of 1
            return fake - target
        found = OBJECTIVES[recipe.objective](Scores(x0, target, fake, alpha, sigma))
        if recipe.divergence:
            found = found * self._weight(logits.detach())
        if recipe.gan:
            found = found + generator_gradient(logits, leaf, recipe.gan)[0]
        return found + self._guidance_apart(x0, cond, draws, update) if recipe.apart else found

    def _level(self, draws: Draws, update: int) -> Tensor:
        """DynaRS: noisier levels at first, by a shift that falls from 4 to 1."""
        uniform, early = draws.uniform("t"), self.recipe.early * self.recipe.updates
        if early:
            shift = 1 + 3 * falling(update / early)
            uniform = shift * uniform / (1 + (shift - 1) * uniform)
        return self.problem.levels(uniform, narrow=True)

    def _guidance(self, update: int) -> float:
        recipe = self.recipe
        if not recipe.guidance_start:
            return recipe.guidance
        share = falling(update / (EASING * recipe.updates))
        return recipe.guidance + share * (recipe.guidance_start - recipe.guidance)

    def _fake(self, x_t: Tensor, level: Tensor, cond: object) -> tuple[Tensor, Tensor | None]:
        """The fake score's estimate of x0, and with a head its logits, with a graph to x_t."""
        if not self.recipe.fake_text:
            cond = self.problem.without_text(cond)
        if self.recipe.has_head:
            estimate, logits = self.problem.judged(self.fake, x_t, level, cond)
            return estimate.detach(), logits
        with torch.no_grad():
            return self.problem.estimates(self.fake, x_t, level, cond)[0], None

    def _from_node(self, target: Tensor, x_t: Tensor, level: Tensor, cond: object) -> Tensor:
        """Away from the path's far node, as guidance is away from the empty caption, in the less noisy half of the levels."""
        away = target - self.problem.estimates(self.target.far, x_t, level, cond)[0]
        return target + self.recipe.node_guidance * (level < 500).view(-1, 1, 1, 1) * away

    def _weight(self, logits: Tensor) -> Tensor:
        """f-distill's h(r) = f''(r) r^2 (Xu et al. 2025, arXiv 2502.15681) of the density ratio r = real / generated, which the
        head's logit is the logarithm of; of mean 1 over the batch. The reverse KL's is 1."""
        ratio = logits.mean(1).exp().clamp(*RATIOS)
        found = ratio if self.recipe.divergence == "forward-kl" else ratio / (1 + ratio)
        return (found / found.mean()).view(-1, 1, 1, 1)

    @torch.no_grad()
    def _guidance_apart(self, x0: Tensor, cond: object, draws: Draws, update: int) -> Tensor:
        """Guidance's part of DMD's gradient at a noise level of its own, not below the student's (Decoupled DMD, Liu et al.
        2025, arXiv 2511.22677)."""
        level = self.problem.levels_from(draws.uniform("guidance t"), self.recipe.level)
        x_t = self.problem.noised(x0, draws.normal("guidance eps", self.problem.shape), level)[0]
        guided, plain = self.problem.estimates(self.target.net, x_t, level, cond, self._guidance(update))
        scale = (x0 - guided).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-8)
        return (plain - guided) / scale

    def _sid(self, x0: Tensor, eps: Tensor, level: Tensor, cond: object) -> Tensor:
        """Score identity distillation (Zhou et al. 2024, arXiv 2404.04057, eq. 23, alpha = 1): the gradient of
        <target - fake, fake - x0> / mean|x0 - target| through both networks. target and fake are estimates of x0, and the
        weight, without gradient, cancels sigma^4 there."""
        problem, x = self.problem, x0.requires_grad_(True)
        self.fake.requires_grad_(False)
        x_t = problem.noised(x, eps, level)[0]
        target = problem.estimates(self.target.net, x_t, level, cond, self.recipe.guidance)[0]
        fake = problem.estimates(self.fake, x_t, level, cond)[0]
        scale = (x - target).detach().abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-8)
        (gradient,) = torch.autograd.grad(((target - fake) * (fake - x) / scale).sum(), x)
        self.fake.requires_grad_(True)
        return gradient
