"""Problems with captions: a miniature pipeline, as `make demo` and `make demo-digits` train them."""

import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.convergence.problem import BATCH, Problem
from benchmarks.convergence.recipes import Recipe
from benchmarks.convergence.scores import Scores
from data.sampling_order import SampleOrder
from data.shard_dataset import ShardDataset
from data.shard_patterns import expand
from models.classifier import Classifier
from models.conditioning import Conditioning
from models.denoise import denoising_loss, predict, predict_guided
from models.gan import Discriminator, head_logits, head_loss, predict_with_logits
from models.multistep import Student
from models.noise import Draws
from models.pipeline import load_network
from models.sampler import Sampler
from trainer.config.schema import RunSettings
from trainer.evaluation.classifier import to_bytes


class TextProblem(Problem):
    """The run of a demo whose teacher and classifier are there."""

    def __init__(self, name: str, settings: RunSettings):
        self.name = name
        pipeline = Path(settings.pipeline)
        self.sampler = Sampler.load(pipeline, settings.data.size, torch.float32, torch.device("cpu"))
        self.schedule, self.shape = self.sampler.schedule, self.sampler.latent_shape
        self.teacher = load_network(pipeline / "unet").eval().requires_grad_(False)
        self.data = self._dataset(settings, settings.data.train, ("caption",))
        captions = {row: sample["caption"] for row, sample in self.data.texts().items()}
        self.train = self._bank([captions[row] for row in range(len(self.data))])
        held = self._dataset(settings, settings.data.heldout, ("image", "caption"))
        samples = [held.read(row) for row in range(len(held))]
        self.heldout = self._bank([sample["caption"] for sample in samples])
        self.scores = self._scores(settings, to_bytes(torch.stack([sample["image"] for sample in samples])))
        self.images = settings.evaluate.images
        self.settings = settings
        self.order: dict[int, SampleOrder] = {}

    @staticmethod
    def _dataset(settings: RunSettings, patterns: str | list[str], want: tuple[str, ...]) -> ShardDataset:
        return ShardDataset(expand(patterns), settings.data.resolution, want, **settings.data.keys)

    @staticmethod
    def _scores(settings: RunSettings, real: Tensor) -> Scores:
        return Scores(Classifier.load(Path(settings.evaluate.classifier) / "model.safetensors"), real)

    @torch.no_grad()
    def _bank(self, captions: list[str]) -> Conditioning:
        """The conditioning of all captions, encoded once."""
        distinct = list(dict.fromkeys(captions))
        parts = [
            self.sampler.text.encode(distinct[low : low + 256], self.sampler.size)
            for low in range(0, len(distinct), 256)
        ]
        tensors = {name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}
        rows = [distinct.index(caption) for caption in captions]
        return replace(parts[0], **tensors).map(lambda value: value[rows])

    def conditioning(self, seed: int, step: int) -> Conditioning:
        rows = self._rows(seed, step)
        return self.train.map(lambda value: value[rows])

    def _rows(self, seed: int, step: int) -> list[int]:
        if seed not in self.order:
            self.order[seed] = SampleOrder(len(self.data), seed)
        return [self.order[seed].row(position) for position in range(step * BATCH, (step + 1) * BATCH)]

    def without_text(self, cond: Conditioning) -> Conditioning:
        """The conditioning of empty captions."""
        return cond.unconditional()

    def new_generator(self, start: str, seed: int) -> nn.Module:
        if start == "teacher":
            return copy.deepcopy(self.teacher)
        config = dict(self.teacher.config)
        if start == "small":
            config["block_out_channels"] = [width // 2 for width in config["block_out_channels"]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return UNet2DConditionModel.from_config(config)

    def _student(self, recipe: Recipe) -> Student:
        return Student(self.schedule, recipe.student or (int(recipe.level),))

    def generate(self, net: nn.Module, cond: Conditioning, draws: Draws, recipe: Recipe) -> Tensor:
        return self._student(recipe).training_sample(net, cond, draws, self.shape)

    def one_step(self, net: nn.Module, first: int, count: int, recipe: Recipe) -> Tensor:
        numbers, student = range(first, first + count), self._student(recipe)
        rows = [number % len(self.heldout.states) for number in numbers]
        cond = self.heldout.map(lambda value: value[rows])
        x0s = student.trajectory(net, cond, lambda k: self.seeded(numbers, self.shape, k), len(student.timesteps))
        return self.sampler.decode(x0s[-1])

    def levels(self, uniform: Tensor, narrow: bool) -> Tensor:
        return self.schedule.timesteps(uniform, *((0.02, 0.98) if narrow else ()))

    def levels_from(self, uniform: Tensor, first: float) -> Tensor:
        """Levels from `first` on, within the range of the score difference."""
        return self.schedule.timesteps(uniform, first / self.schedule.steps, 0.98)

    def noised(self, x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.schedule.add_noise(x0, eps, level), *self.schedule.alpha_sigma(level)

    def estimates(
        self, net: nn.Module, x_t: Tensor, level: Tensor, cond: Conditioning, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        guided, plain = predict_guided(net, x_t, level, cond, guidance)
        first = self.schedule.to_x0(guided, x_t, level)
        return first, first if plain is guided else self.schedule.to_x0(plain, x_t, level)

    def loss(self, net: nn.Module, x0: Tensor, eps: Tensor, level: Tensor, cond: Conditioning) -> Tensor:
        return denoising_loss(net, self.schedule, x0, eps, level, cond)

    def raw(self, net: nn.Module, x_t: Tensor, level: Tensor, cond: Conditioning) -> Tensor:
        return predict(net, x_t, level, cond)

    def discriminator(self, net: nn.Module, seed: int) -> Discriminator:
        return Discriminator(net, self.shape, seed)

    def judged(self, net: nn.Module, x_t: Tensor, level: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """A discriminator's estimate of x0, and its logits [B, patches] with a graph to x_t."""
        raw, logits = predict_with_logits(net, x_t, level, cond, decoder_grad=False)
        return self.schedule.to_x0(raw, x_t, level), logits

    def losses_with_head(
        self,
        net: nn.Module,
        x0: Tensor,
        eps: Tensor,
        level: Tensor,
        cond: Conditioning,
        draws: Draws,
        batch: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """The denoising loss on generated samples, and the head's on them and on the real ones of a batch (seed, step)."""
        prediction, fake = predict_with_logits(net, self.schedule.add_noise(x0, eps, level), level, cond)
        latents, real_level = self.real[self._rows(*batch)], self.levels(draws.uniform("real t"), narrow=False)
        x_t = self.schedule.add_noise(latents, draws.normal("real eps", self.shape), real_level)
        real = head_logits(net, x_t, real_level, cond)
        return mse_loss(prediction, self.schedule.target(x0, eps, level)), head_loss(fake, real)

    @cached_property
    @torch.no_grad()
    def real(self) -> Tensor:
        """Latents of all training images."""
        data = self._dataset(self.settings, self.settings.data.train, ("image",))
        images = torch.stack([data.read(row)["image"] for row in range(len(data))])
        rng = torch.Generator().manual_seed(0)
        eps = torch.randn((len(images), *self.shape), generator=rng)
        return torch.cat([self.sampler.encode(*part) for part in zip(images.split(256), eps.split(256), strict=True)])
