"""One run: the path, if the method has one, then distillation, with scores along the way. The product's loop is
trainer/backtrack.py; this one keeps everything in memory and knows more variants."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.convergence.problem import BATCH, Problem
from benchmarks.convergence.recipes import Recipe
from models.noise import Draws
from models.objectives import OBJECTIVES, Scores
from trainer.config.schema import OptimizerSettings
from trainer.engine.optimizer import learning_rate
from trainer.path.candidates import choose_nodes
from trainer.path.target import fixed_switches, target_node

CLIP = 10.0  # largest gradient norm, the product's default
ADAM_EPS = 1e-8
Weights = list[Tensor]


class Trained:
    """A network with the product's optimizer."""

    def __init__(self, net: nn.Module, settings: OptimizerSettings, updates: int):
        self.net, self.settings, self.updates = net.train().requires_grad_(True), settings, updates
        rule = {"betas": settings.betas, "eps": ADAM_EPS, "weight_decay": settings.weight_decay}
        self.adam = torch.optim.AdamW(net.parameters(), lr=settings.lr, fused=True, **rule)

    def step(self, loss: Tensor, update: int) -> None:
        self.adam.param_groups[0]["lr"] = learning_rate(self.settings, update, self.updates)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        self.adam.step()
        self.adam.zero_grad()


def weights(net: nn.Module) -> Weights:
    """A copy of a network's weights."""
    return [p.detach().clone() for p in net.parameters()]


@torch.no_grad()
def mix(net: nn.Module, one: Weights, other: Weights, share: float) -> None:
    """Sets a network's weights to one + share (other - one)."""
    for p, a, b in zip(net.parameters(), one, other, strict=True):
        torch.lerp(a, b, share, out=p)


def put(net: nn.Module, values: Weights) -> None:
    """Sets a network's weights."""
    mix(net, values, values, 0.0)


def record(problem: Problem, recipe: Recipe, generator: nn.Module, seed: int) -> list[Weights]:
    """The path's nodes from the teacher on, evenly spaced in score distance. The product keeps at most twice as many
    candidates as nodes; these are all steps."""
    noise, count, steps = problem.noise(seed, "record"), list(range(BATCH)), recipe.record_steps
    role = Trained(copy.deepcopy(problem.teacher), OptimizerSettings(lr=recipe.record_lr), steps)
    draws, cond = noise.at(0, count), problem.conditioning(seed, 0)
    with torch.no_grad():
        x0 = problem.generate(generator, cond, draws, recipe)
        level = problem.levels(draws.uniform("probe t"), narrow=True)
        x_t = problem.noised(x0, draws.normal("probe eps", problem.shape), level)[0]
    probe = x_t, level, cond
    first, found, distances = problem.raw(problem.teacher, *probe), [], []
    for step in range(steps):
        draws, cond = noise.at(step, count), problem.conditioning(seed, step)
        with torch.no_grad():
            x0 = problem.generate(generator, cond, draws, recipe)
        level = problem.levels(draws.uniform("t"), narrow=False)
        role.step(problem.loss(role.net, x0, draws.normal("eps", problem.shape), level, cond), step)
        with torch.no_grad():
            distances.append(float((problem.raw(role.net, *probe) - first).square().mean()))
        found.append(weights(role.net))
    return [weights(problem.teacher), *(found[i] for i in choose_nodes(distances, recipe.nodes))]


class Target:
    """The network that the generator is pulled toward, at each of its updates."""

    def __init__(self, problem: Problem, recipe: Recipe, nodes: list[Weights]):
        self.recipe, self.nodes, self.net = recipe, nodes, copy.deepcopy(problem.teacher).eval().requires_grad_(False)
        self.teacher = weights(problem.teacher)
        self.switches = fixed_switches(len(nodes), recipe.interval) if nodes else []
        self.node = 0

    def move(self, update: int, fake: nn.Module) -> None:
        recipe = self.recipe
        if recipe.method == "walk":
            node = target_node(update, len(self.nodes), self.switches)
            if node != self.node:
                self.node = node
                put(self.net, self.nodes[node])
        elif recipe.method == "fine":
            place = max(len(self.nodes) - 2 - update / recipe.interval, 0.0)
            low = math.floor(place)
            mix(self.net, self.nodes[low], self.nodes[min(low + 1, len(self.nodes) - 1)], place - low)
        elif recipe.method == "blend":
            progress = min(update / (recipe.blend_share * recipe.updates), 1.0)
            share = recipe.blend * 0.5 * (1 + math.cos(math.pi * progress))
            mix(self.net, self.teacher, [p.detach() for p in fake.parameters()], share)


class Distillation:
    """The three roles, and the generator's update and the fake score's."""

    def __init__(self, problem: Problem, recipe: Recipe, seed: int):
        self.problem, self.recipe, self.seed = problem, recipe, seed
        generator = problem.new_generator(recipe.start, seed)
        nodes = record(problem, recipe, generator, seed) if recipe.records else []
        fake = copy.deepcopy(problem.teacher)
        if nodes:
            put(fake, nodes[-1])
        rule = {"betas": recipe.betas}
        settings = OptimizerSettings(lr=recipe.lr, decay=recipe.decay, **rule)
        self.generator = Trained(generator, settings, recipe.updates)
        self.fake = Trained(fake, OptimizerSettings(lr=recipe.fake_lr, **rule), recipe.updates * recipe.fake_updates)
        self.target = Target(problem, recipe, nodes)
        self.noise = problem.noise(seed, "backtrack")
        self.average = weights(generator)

    def step(self, step: int) -> None:
        """One fake-score update, and before every `fake_updates`-th a generator update."""
        problem, recipe = self.problem, self.recipe
        update, rest = divmod(step, recipe.fake_updates)
        draws, cond = self.noise.at(step, list(range(BATCH))), problem.conditioning(self.seed, step)
        if rest:
            with torch.no_grad():
                x0 = problem.generate(self.generator.net, cond, draws, recipe)
        else:
            self.target.move(update, self.fake.net)
            x0 = problem.generate(self.generator.net, cond, draws, recipe)
            gradient = self.gradient(x0.detach(), cond, draws, update)
            self.generator.step((x0 * gradient).mean(), update)
            x0 = x0.detach()
        level = problem.levels(draws.uniform("fake t"), narrow=False)
        self.fake.step(problem.loss(self.fake.net, x0, draws.normal("fake eps", problem.shape), level, cond), step)
        if rest == 0:
            self._after_generator_update()

    @torch.no_grad()
    def _after_generator_update(self) -> None:
        for average, p in zip(self.average, self.generator.net.parameters(), strict=True):
            average.lerp_(p, 1 - self.recipe.ema)
        if self.recipe.ida:
            for fake, p in zip(self.fake.net.parameters(), self.generator.net.parameters(), strict=True):
                fake.lerp_(p, self.recipe.ida)

    def _level(self, draws: Draws, update: int) -> Tensor:
        """DynaRS: noisier levels at first, by a shift that falls from 4 to 1."""
        uniform, early = draws.uniform("t"), self.recipe.early * self.recipe.updates
        if update < early:
            shift = 1 + 3 * 0.5 * (1 + math.cos(math.pi * update / early))
            uniform = shift * uniform / (1 + (shift - 1) * uniform)
        return self.problem.levels(uniform, narrow=True)

    def gradient(self, x0: Tensor, cond: object, draws: Draws, update: int) -> Tensor:
        """The gradient on x0 [B, *shape]."""
        problem, recipe, level = self.problem, self.recipe, self._level(draws, update)
        eps = draws.normal("eps", problem.shape)
        if recipe.objective == "sid":
            return self._sid(x0, eps, level, cond)
        x_t, alpha, sigma = problem.noised(x0, eps, level)
        with torch.no_grad():
            target = problem.estimates(self.target.net, x_t, level, cond, recipe.guidance)[0]
            fake = problem.estimates(self.fake.net, x_t, level, cond)[0]
        if recipe.objective == "difference":  # Diff-Instruct's released loss, in pixel space: a weight of 1
            return fake - target
        return OBJECTIVES[recipe.objective](Scores(x0, target, fake, alpha, sigma))

    def _sid(self, x0: Tensor, eps: Tensor, level: Tensor, cond: object) -> Tensor:
        """Score identity distillation (Zhou et al. 2024, arXiv 2404.04057, eq. 23, alpha = 1): the gradient of
        <target - fake, fake - x0> / mean|x0 - target| through both networks. target and fake are estimates of x0, and the
        weight, without gradient, cancels sigma^4 there."""
        problem, x = self.problem, x0.requires_grad_(True)
        self.fake.net.requires_grad_(False)
        x_t = problem.noised(x, eps, level)[0]
        target = problem.estimates(self.target.net, x_t, level, cond, self.recipe.guidance)[0]
        fake = problem.estimates(self.fake.net, x_t, level, cond)[0]
        scale = (x - target).detach().abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-8)
        (gradient,) = torch.autograd.grad(((target - fake) * (fake - x) / scale).sum(), x)
        self.fake.net.requires_grad_(True)
        return gradient


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
            yield {"compute": compute, **problem.score(shown, recipe)}
