"""The diffusion schedule and what a network predicts on it.

Forward process (Ho et al. 2020, eq. 4): x_t = alpha_t x0 + sigma_t eps, with alpha_t^2 = abar_t and sigma_t^2 = 1 - abar_t.
"""

from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from models.errors import ModelError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """A discrete variance-preserving schedule.

    alphas_cumprod: abar_t for t = 0..T-1, float32 of shape [T].
    prediction: what networks of this schedule output: "epsilon", "v_prediction" (Salimans & Ho 2022) or "sample" (x0).
    """

    alphas_cumprod: Tensor
    prediction: str

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """Builds the schedule from a diffusers scheduler's configuration (any scheduler with betas).

        Raises ModelError for a prediction type that is not known.
        """
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise ModelError(f"scheduler: prediction_type '{prediction}' is not one of {', '.join(PREDICTIONS)}")
        scheduler = DDPMScheduler.from_config(config)
        return cls(scheduler.alphas_cumprod.float(), prediction)

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> "Schedule":
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for integer timesteps t of shape [B], each of shape [B, 1, 1, 1]."""
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def timesteps(self, uniform: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Integer timesteps from uniform draws in [0, 1): t ~ U[low T, high T), int64 of shape [B]."""
        first, last = int(low * self.steps), int(high * self.steps)
        return (first + uniform * (last - first)).long().clamp(first, last - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of the forward process; x0 and noise of shape [B, C, H, W], t of shape [B]."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a network of this prediction type should output for (x0, noise, t)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        alpha, sigma = self.alpha_sigma(t)
        return alpha * noise - sigma * x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that a network's prediction at (x_t, t) stands for."""
        if self.prediction == "sample":
            return prediction
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction == "epsilon":
            return (x_t - sigma * prediction) / alpha
        return alpha * x_t - sigma * prediction

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a network's prediction at (x_t, t) stands for."""
        if self.prediction == "epsilon":
            return prediction
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction == "sample":
            return (x_t - alpha * prediction) / sigma
        return alpha * prediction + sigma * x_t
