"""What a recipe is run on: networks, noise levels, conditioning, real images."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from benchmarks.convergence.recipes import Recipe
from benchmarks.convergence.scores import Scores
from models.noise import Draws, SampleNoise

BATCH = 32
SEEDS = 1_000_000  # of evaluation noise, far from those of training


class Problem(ABC):
    """A teacher and its data. Tensors are [B, *shape]; a level is what the network is told of the noise: a timestep, or
    sigma. scores: the metrics; images: how many each score is computed on. Problems with captions have more, for the recipes
    that need a head or captions (benchmarks/convergence/text.py)."""

    name: str
    teacher: nn.Module
    shape: tuple[int, ...]
    scores: Scores
    images: int

    @abstractmethod
    def conditioning(self, seed: int, step: int) -> object:
        """Of the batch of a training step."""

    @abstractmethod
    def new_generator(self, start: str, seed: int) -> nn.Module:
        """A generator to train; start: as in Recipe."""

    @abstractmethod
    def generate(self, net: nn.Module, cond: object, draws: Draws, recipe: Recipe) -> Tensor:
        """The generator's x0 of a training batch; a gradient flows unless the caller disables it."""

    @abstractmethod
    def one_step(self, net: nn.Module, first: int, count: int, recipe: Recipe) -> Tensor:
        """uint8 images of the generator, numbers first .. first + count - 1."""

    @abstractmethod
    def levels(self, uniform: Tensor, narrow: bool) -> Tensor:
        """Levels [B] of uniform draws. narrow: the range of the score difference, else that of denoising."""

    @abstractmethod
    def noised(self, x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, and its alpha and sigma [B, 1, 1, 1]."""

    @abstractmethod
    def estimates(
        self, net: nn.Module, x_t: Tensor, level: Tensor, cond: object, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The network's estimates of x0, with guidance and without."""

    @abstractmethod
    def loss(self, net: nn.Module, x0: Tensor, eps: Tensor, level: Tensor, cond: object) -> Tensor:
        """The denoising loss, a scalar."""

    @abstractmethod
    def raw(self, net: nn.Module, x_t: Tensor, level: Tensor, cond: object) -> Tensor:
        """The network's output, whose change the score distance of the path is measured by."""

    def noise(self, seed: int, stage: str) -> SampleNoise:
        """The noise of a stage, as the product draws it."""
        return SampleNoise(f"{seed}/{stage}")

    @torch.no_grad()
    def score(self, net: nn.Module, recipe: Recipe) -> dict[str, float]:
        parts = [self.one_step(net, first, BATCH * 4, recipe) for first in range(0, self.images, BATCH * 4)]
        return self.scores(torch.cat(parts)[: self.images])

    @staticmethod
    def seeded(numbers: range, shape: tuple[int, ...], stream: int = 0) -> Tensor:
        """Evaluation noise by image number, the same for every recipe."""
        rng = torch.Generator()
        return torch.stack(
            [torch.randn(shape, generator=rng.manual_seed(SEEDS * (stream + 1) + number)) for number in numbers]
        )
