"""Problems as in the paper: pixels, no captions, an EDM teacher (Karras et al. 2022), levels are sigma."""

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.convergence.problem import BATCH, Problem
from benchmarks.convergence.recipes import Recipe
from benchmarks.convergence.scores import Scores
from models.classifier import Classifier, new_classifier
from models.image_metrics import as_floats
from models.noise import Draws
from models.sampler import to_uint8

SIDE, DATA = 16, 0.5  # pixels; EDM's sigma_data
MEAN, DEVIATION = -1.2, 1.2  # of ln sigma (EDM, table 1)
STEPS, RATE, EMA = 2000, 1e-3, 0.998  # of the teacher's training


class Edm(nn.Module):
    """EDM's preconditioning around a small UNet: estimates of x0 from x0 + sigma eps (EDM, eq. 7). The UNet sees each 2x2
    pixels as one position of 12 channels, a quarter of the work."""

    def __init__(self, channels: tuple[int, int] = (32, 64)):
        super().__init__()
        self.channels = channels
        self.net = UNet2DModel(
            sample_size=SIDE // 2,
            in_channels=12,
            out_channels=12,
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=16,
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        scale = (s**2 + DATA**2).sqrt()
        inputs = functional.pixel_unshuffle(x / scale, 2)
        raw = self.net(inputs, 250 * sigma.log(), return_dict=False)[0]  # ln(sigma) / 4 in units of 1/1000
        raw = functional.pixel_shuffle(raw, 2)
        return DATA**2 / scale**2 * x + s * DATA / scale * raw


class SigmaProblem(Problem):
    """An unconditional teacher, trained once and kept in `folder`."""

    def __init__(self, name: str, images: Tensor, labels: list, held: Tensor, folder: Path):
        """images, held: uint8 [N, 3, 16, 16], to train on and to compare with. labels: of `images`, for the classifier whose
        features FID is on."""
        self.name, self.shape, self.images = name, (3, SIDE, SIDE), min(len(held), 1024)
        self.scores = Scores(self._classifier(folder / f"{name}-classifier.safetensors", images, labels), held)
        self.teacher = self._teacher(folder / f"{name}-teacher.safetensors", as_floats(images))

    @staticmethod
    def _classifier(file: Path, images: Tensor, labels: list) -> Classifier:
        if not file.exists():
            network = new_classifier(SIDE, 32, {"class": sorted(set(labels))}, seed=0)
            network.fit(images, {"class": labels}, 600, seed=0)
            network.save(file)
        return Classifier.load(file)

    def _teacher(self, file: Path, images: Tensor) -> Edm:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = Edm()
        if file.exists():
            net.load_state_dict(load_file(file))
            return net.eval().requires_grad_(False)
        rng, adam = torch.Generator().manual_seed(0), torch.optim.AdamW(net.parameters(), lr=RATE, fused=True)
        average = copy.deepcopy(net).eval().requires_grad_(False)
        for step in range(STEPS):
            x0 = images[torch.randint(len(images), (64,), generator=rng)]
            sigma = self.levels(torch.rand(64, generator=rng), narrow=False)
            loss = self.loss(net, x0, torch.randn(x0.shape, generator=rng), sigma, None)
            adam.param_groups[0]["lr"] = RATE * min((step + 1) / 100, 1) * 0.5 * (1 + np.cos(np.pi * step / STEPS))
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            with torch.no_grad():
                for mean, p in zip(average.parameters(), net.parameters(), strict=True):
                    mean.lerp_(p, 1 - EMA)
            if (step + 1) % 500 == 0:
                print(f"{self.name}: teacher step {step + 1} of {STEPS}, loss {float(loss):.3f}", flush=True)
        save_file(average.state_dict(), file)
        return average

    def conditioning(self, seed: int, step: int) -> None:
        return None

    def new_generator(self, start: str, seed: int) -> Edm:
        if start == "teacher":
            return copy.deepcopy(self.teacher)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Edm() if start == "random" else Edm((16, 32))

    @staticmethod
    def _from_noise(net: Edm, z: Tensor, sigma: float) -> Tensor:
        """One step: G(z) = D(sigma z, sigma), as Diff-Instruct and SiD do."""
        return net(sigma * z, torch.full((len(z),), float(sigma)))

    def generate(self, net: Edm, cond: None, draws: Draws, recipe: Recipe) -> Tensor:
        return self._from_noise(net, draws.normal("z", self.shape), recipe.level)

    def one_step(self, net: Edm, first: int, count: int, recipe: Recipe) -> Tensor:
        return to_uint8(self._from_noise(net, self.seeded(range(first, first + count), self.shape), recipe.level), True)

    def levels(self, uniform: Tensor, narrow: bool) -> Tensor:
        """Log-normal, for the score difference as for denoising (Diff-Instruct's released loss)."""
        return (MEAN + DEVIATION * torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))).exp()

    def noised(self, x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma = level.view(-1, 1, 1, 1)
        return x0 + sigma * eps, torch.ones_like(sigma), sigma

    def estimates(
        self, net: Edm, x_t: Tensor, level: Tensor, cond: None, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        found = net(x_t, level)
        return found, found

    def loss(self, net: Edm, x0: Tensor, eps: Tensor, level: Tensor, cond: None) -> Tensor:
        """EDM's loss, weighted to 1 at every sigma."""
        x_t, _, sigma = self.noised(x0, eps, level)
        weight = (sigma**2 + DATA**2) / (sigma * DATA) ** 2
        return (weight * (net(x_t, level) - x0) ** 2).mean()

    def raw(self, net: Edm, x_t: Tensor, level: Tensor, cond: None) -> Tensor:
        return net(x_t, level)

    @torch.no_grad()
    def sampled(self, steps: int) -> dict[str, float]:
        """Scores of the teacher's own samples: Heun steps over EDM's sigmas from 80 to 0.002 (EDM, algorithm 1)."""
        ramp = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps) ** 7
        sigmas, parts = [*ramp.tolist(), 0.0], []
        for first in range(0, self.images, BATCH * 4):
            x = 80 * self.seeded(range(first, first + BATCH * 4), self.shape)
            for s, t in pairwise(sigmas):
                slope = (x - self.teacher(x, torch.full((len(x),), s))) / s
                ahead = x + (t - s) * slope
                if t:
                    slope = (slope + (ahead - self.teacher(ahead, torch.full((len(x),), t))) / t) / 2
                x = x + (t - s) * slope
            parts.append(to_uint8(x, True))
        return self.scores(torch.cat(parts)[: self.images])
