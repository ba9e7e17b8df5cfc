"""The path of a run and the network that the generator is pulled toward. Weights are kept in memory."""

import copy
import math

import torch
from torch import Tensor, nn

from benchmarks.convergence.optimize import Trained
from benchmarks.convergence.problem import BATCH, Problem
from benchmarks.convergence.recipes import Recipe
from trainer.config.schema import OptimizerSettings
from trainer.path.candidates import choose_nodes
from trainer.path.target import fixed_switches, target_node

Weights = list[Tensor]


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


def falling(progress: float) -> float:
    """Half a cosine from 1 at progress 0 to 0 at 1 and beyond."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


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
    """The network that the generator is pulled toward, at each of its updates. far: the path's far node as a network, for
    node guidance, else None."""

    def __init__(self, problem: Problem, recipe: Recipe, nodes: list[Weights]):
        self.recipe, self.nodes, self.net = recipe, nodes, copy.deepcopy(problem.teacher).eval().requires_grad_(False)
        self.teacher, self.far = weights(problem.teacher), None
        if recipe.node_guidance:
            self.far = copy.deepcopy(self.net)
            put(self.far, nodes[-1])
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
            share = recipe.blend * falling(update / (recipe.blend_share * recipe.updates))
            mix(self.net, self.teacher, [p.detach() for p in fake.parameters()], share)
