"""The convergence study: its loop is the product's, known scores give known results, and finished runs stay finished."""

import copy
import json
import math
from dataclasses import replace

import pytest
import support
import torch
from torch import nn

from benchmarks.convergence.diagnostics import NAMES, predictions
from benchmarks.convergence.gradient import SampleGradient
from benchmarks.convergence.path import Target, record
from benchmarks.convergence.problem import Problem
from benchmarks.convergence.recipes import METHODS, Recipe
from benchmarks.convergence.store import Store
from benchmarks.convergence.study import FULL, PICK, QUICK, Part, Runs
from benchmarks.convergence.tables import table, walk_share, with_recordings
from benchmarks.convergence.text import TextProblem
from benchmarks.convergence.train import Distillation, distil
from models.diffusion import Schedule
from models.pipeline import load_network
from trainer.backtrack import backtrack
from trainer.training.run import Run

SHAPE = (1, 4, 4)
A, B = (1.0, 0.5), (-1.0, 1.5)  # mean and deviation of the teacher's distribution, and of the untrained generator's


class Known(nn.Module):
    """The optimal denoiser of independent Gaussian pixels: what a network would learn, with two parameters."""

    def __init__(self, mean: float, deviation: float):
        super().__init__()
        self.mean, self.log = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(deviation).log())

    def forward(self, x_t, alpha, sigma):
        variance = (2 * self.log).exp()
        return self.mean + alpha * variance * (x_t - alpha * self.mean) / (alpha**2 * variance + sigma**2)

    def about(self):
        return float(self.mean), float(self.log.exp())


class Gaussian(Problem):
    """Teacher A and start B, with every score known."""

    name, shape, images = "gaussian", SHAPE, 0
    one_step = None  # the scores are those of the two parameters, not of images

    def __init__(self):
        self.schedule = Schedule.from_config(
            {"_class_name": "DDPMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        )
        self.teacher = Known(*A)

    def conditioning(self, seed, step):
        return None

    def new_generator(self, start, seed):
        return Known(*B)

    def generate(self, net, cond, draws, recipe):
        return net.mean + net.log.exp() * draws.normal("z", SHAPE)

    def score(self, net, recipe):
        mean, deviation = net.about()
        return {"fid": (mean - A[0]) ** 2 + (deviation - A[1]) ** 2, "pixel_fd": abs(mean - A[0]), "recall": 1.0}

    def levels(self, uniform, narrow):
        return self.schedule.timesteps(uniform, *((0.02, 0.98) if narrow else ()))

    def noised(self, x0, eps, level):
        return self.schedule.add_noise(x0, eps, level), *self.schedule.alpha_sigma(level)

    def estimates(self, net, x_t, level, cond, guidance=1.0):
        found = net(x_t, *self.schedule.alpha_sigma(level))
        return found, found

    def loss(self, net, x0, eps, level, cond):
        x_t, alpha, sigma = self.noised(x0, eps, level)
        return ((net(x_t, alpha, sigma) - x0) ** 2).mean()

    def raw(self, net, x_t, level, cond):
        return self.estimates(net, x_t, level, cond)[0]


EASY = Recipe(lr=0.05, fake_lr=0.1, guidance=1.0, record_lr=0.1, record_steps=60, budget=4800, ema=0.95, interval=30)


@pytest.mark.parametrize(
    ("method", "objective"), [*((method, "vsd") for method in METHODS), ("none", "dmd"), ("walk", "sid")]
)
def test_every_method_takes_a_gaussian_to_its_teacher(method, objective):
    """Nodes lie between B and A, and every chain ends at A to a hundredth."""
    problem, recipe = Gaussian(), replace(EASY, method=method, objective=objective)
    if recipe.records:
        nodes = record(problem, recipe, problem.new_generator("teacher", 0), 0)
        means = [float(mean) for mean, _ in nodes]
        assert means[0] == A[0] and means == sorted(means, reverse=True) and len(nodes) == recipe.nodes + 1
        assert means[-1] == pytest.approx(B[0], abs=0.1) and math.exp(nodes[-1][1]) == pytest.approx(B[1], abs=0.1)
    points = list(distil(problem, recipe, 0, 4))
    assert points[-1]["fid"] < 1e-4 < points[0]["fid"]
    assert [point["compute"] for point in points] == sorted(point["compute"] for point in points)
    assert recipe.budget - recipe.update_cost <= points[-1]["compute"] <= recipe.budget


def test_targets_of_the_methods():
    """Which weights the target has at each generator update, in multiples between teacher 0 and far node 3."""
    problem = Gaussian()
    nodes = [[torch.tensor(float(k)), torch.tensor(0.0)] for k in range(4)]
    problem.teacher = Known(0.0, 1.0)
    fake = Known(3.0, 1.0)

    def means(method, **more):
        recipe = replace(EASY, method=method, interval=2, budget=6 * EASY.update_cost + 402, **more)
        target = Target(problem, recipe, nodes if recipe.records else [])
        found = []
        for update in range(6):
            target.move(update, fake)
            found.append(round(float(target.net.mean), 6))
        return found

    assert means("walk") == [2, 2, 1, 1, 0, 0]
    assert means("fine") == [2, 1.5, 1, 0.5, 0, 0]
    assert means("none") == means("warm") == [0] * 6
    blend = means("blend", blend=0.5, blend_share=0.05)
    assert blend[0] == pytest.approx(1.5) and blend == sorted(blend, reverse=True) and blend[-1] == 0


def test_diagnostics_leave_training_alone_and_see_a_fake_score_that_lags():
    problem, recipe = Gaussian(), replace(EASY, budget=1600)
    plain, seen = (list(distil(problem, replace(recipe, refit=refit), 0, 4)) for refit in (0, 20))
    assert [point | plain[k] for k, point in enumerate(seen)] == seen and "cosine" not in seen[0]
    slow = list(distil(problem, replace(recipe, fake_lr=1e-4, refit=20), 0, 4))
    assert seen[-1]["excess"] < 0.01 < slow[-1]["excess"] and len(seen[-1]) == len(plain[-1]) + 5
    found = predictions([seen, slow, plain], ("fid",))
    assert found.keys() == NAMES.keys() and found["excess"][1] == pytest.approx(1)  # the one that lags ends worse


def test_gradients_of_the_variants():
    """A far node that is the teacher guides nowhere; f-distill's weights have mean 1 and favour what looks real; the guidance
    changes over half of the run."""
    problem = Gaussian()
    cond, draws, x0 = None, problem.noise(0, "test").at(0, list(range(32))), torch.randn(32, *SHAPE)
    far = [[p.detach() for p in problem.teacher.parameters()]]
    found = []
    for recipe in (EASY, replace(EASY, node_guidance=1.0)):
        target = Target(problem, recipe, far if recipe.records else [])
        found.append(SampleGradient(problem, recipe, target, Known(*B))(x0, cond, draws, 0))
    torch.testing.assert_close(*found)
    node, plain = [[p.detach() for p in Known(*B).parameters()]], replace(EASY, objective="vsd")
    recipe = replace(plain, node_guidance=0.7)
    away, none = (
        SampleGradient(problem, each, Target(problem, each, node), Known(*B))(x0, cond, draws, 0)
        for each in (recipe, plain)
    )
    level = problem.levels(draws.uniform("t"), narrow=True)
    x_t, alpha, sigma = problem.noised(x0, draws.normal("eps", SHAPE), level)
    teacher, far = (problem.estimates(net, x_t, level, cond)[0] for net in (Known(*A), Known(*B)))
    near = (level < 500).view(-1, 1, 1, 1)
    torch.testing.assert_close(away, none - alpha * sigma * 0.7 * near * (teacher - far))
    apart = replace(EASY, guidance=1.5, apart=True)
    problem.estimates = lambda net, x, level, cond, guidance=1.0: (x + guidance - 1, x)
    problem.levels_from = lambda uniform, first: problem.schedule.timesteps(uniform, first / 1000, 0.98)
    gradient = SampleGradient(problem, apart, target, Known(*B))
    assert (gradient(x0, cond, draws, 0) < 0).all()  # both networks agree but for the guidance, which raises the target
    problem = Gaussian()
    for divergence in ("forward-kl", "jensen-shannon"):
        recipe = replace(EASY, divergence=divergence)
        weights = (
            SampleGradient(problem, recipe, target, Known(*B))._weight(torch.linspace(-3, 3, 32)[:, None]).flatten()
        )
        assert (
            weights.mean() == pytest.approx(1) and (weights.diff() >= 0).all() and weights[-1] > 1.5 > 0.5 > weights[0]
        )
    eased = SampleGradient(problem, replace(EASY, guidance=1.25, guidance_start=2.0), target, Known(*B))
    found = [eased._guidance(round(share * eased.recipe.updates)) for share in (0, 0.25, 0.5, 1)]
    assert found == pytest.approx([2, 1.625, 1.25, 1.25], abs=0.01)


def test_compute_is_the_products(root, world):
    """Cost of a generator update and of the recording, by the counts that metrics lines carry."""
    flags = ("backtrack.fake_updates=1", "backtrack.guidance_scale=1.25")
    run = Run(support.tiny(root, "cost", *flags), world)
    backtrack(run)
    lines = [json.loads(line) for line in (run.folder / "backtrack" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["compute"] / lines[-1]["step"] == pytest.approx(Recipe().update_cost)
    # Noise has a mean square of 1, so that predicting zero has a loss of 1.
    assert lines[-1]["fake_score_error"] == pytest.approx(lines[-1]["loss/fake_score"], rel=0.1)
    assert Recipe(fake_updates=5).update_cost == 25 and Recipe(objective="sid").update_cost == 12
    assert Recipe(method="walk").recording_cost == 82 and Recipe(guidance=1.0).update_cost == 8


@pytest.mark.parametrize("gan", [0.0, 0.05])
def test_the_loop_trains_what_the_product_trains(root, world, monkeypatch, gan):
    """Plain distillation with guidance and two fake updates per turn, and with the GAN term on the same real latents: the
    same generator, to rounding."""
    monkeypatch.setattr("benchmarks.convergence.problem.BATCH", 8)
    monkeypatch.setattr("benchmarks.convergence.text.BATCH", 8)
    monkeypatch.setattr("benchmarks.convergence.train.BATCH", 8)
    monkeypatch.setattr("benchmarks.convergence.path.BATCH", 8)
    flags = ("backtrack.path=none", "backtrack.steps=8", "backtrack.fake_updates=2", "seed=3", *support.EPS)
    if gan:
        flags += ("gan.enabled=true", f"gan.generator_weight={gan}", "gan.head_weight=0.1")
    settings = support.tiny(root, f"alike-{gan}", *flags, "backtrack.batch=8")
    monkeypatch.setattr(TextProblem, "_scores", lambda self, *_: None)
    problem = TextProblem("tiny", settings)
    if gan:
        steps = iter(range(8))
        real = lambda *_: problem.real[problem._rows(3, next(steps))]  # noqa: E731
        monkeypatch.setattr("trainer.training.gan_term.batch_latents", real)
    backtrack(Run(settings, world))
    ours = settings.backtrack
    recipe = Recipe(
        lr=ours.generator.lr,
        fake_lr=ours.fake_score.lr,
        betas=ours.generator.betas,
        fake_updates=2,
        guidance=ours.guidance_scale,
        level=settings.conditioning_timestep,
        ema=ours.ema,
        ema_warmup=ours.ema_warmup,
        gan=gan,
        head=0.1,
    )
    recipe = replace(recipe, budget=4 * recipe.update_cost)
    monkeypatch.setattr("benchmarks.convergence.optimize.ADAM_EPS", 1e-4)
    run = Distillation(problem, recipe, 3)
    for step in range(8):
        run.step(step)
    expected = load_network(settings.folder / "backtrack" / "checkpoints" / "step-00000008" / "weights")
    for mine, theirs in zip(run.average, expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-5)


def test_what_has_run_is_not_run_again(tmp_path):
    """A second study computes nothing; a line that a killed process cut off is computed again."""
    made = []

    def problem(name):
        made.append(name)
        return Gaussian()

    short = replace(EASY, budget=800, record_steps=20)
    rows = {"none": short, "walk": replace(short, method="walk")}
    part = Part("gaussian", "dmd", rows, (1, 2), ({}, {"lr": 0.01}))
    first = Runs(Store(tmp_path, problem).run)
    found = first.of(part)
    text = (tmp_path / "runs-gaussian.jsonl").read_text()
    assert len(made) == len(text.splitlines()) == 2 * (2 * len(PICK) + 2)
    again = Runs(Store(tmp_path, problem, only_known=True).run)
    assert again.of(part) == found and again.chosen == first.chosen and len(made) == len(text.splitlines())
    chosen = {label: first.chosen["gaussian", "dmd", label] for label in rows}
    shown = table(part, with_recordings(found, chosen), chosen)
    assert "gaussian, dmd: 2 seeds" in shown and len({line.count("|") for line in shown.splitlines()[2:]}) == 1
    (tmp_path / "runs-gaussian.jsonl").write_text(text[:-20])
    with pytest.raises(KeyError):
        Runs(Store(tmp_path, problem, only_known=True).run).of(part)
    assert Runs(Store(tmp_path, problem).run).of(part) == found


def curves(*ends: float) -> list[list[dict]]:
    """One run per end, whose scores fall to it in a straight line of the logarithms from 16."""
    return [
        [{"compute": c, "fid": 16 * (end / 16) ** (c / 100), "pixel_fd": 2.0} for c in (0, 50, 100)] for end in ends
    ]


def test_the_walks_share_is_told_with_its_spread():
    cells = walk_share("here", curves(4, 4.1, 3.9), curves(1, 1.1, 0.9))
    assert cells[:5] == ["here", "3", "4.00 +- 0.1", "1.00 +- 0.1", "better"] and float(cells[5]) == pytest.approx(
        2, abs=0.05
    )
    assert cells[6:] == ["2.00 +- 0", "2.00 +- 0", "level", "1.00"]
    assert walk_share("here", curves(1, 1.1, 0.9), curves(4, 4.1, 3.9))[4:6] == ["worse", "-"]
    assert walk_share("here", curves(1, 4, 2), curves(2, 1, 3))[4] == "level"


def test_the_parts_are_fair():
    """Within a part, every row has the same budget and the same choice of rates, but for the recipes' own comparison."""
    for part in (*FULL, *QUICK):
        assert set(part.seeds).isdisjoint(PICK)
        if part.name != "recipe":
            assert len({recipe.budget for recipe in part.rows.values()}) == 1 and not part.untuned
    assert copy.deepcopy(FULL) == FULL
