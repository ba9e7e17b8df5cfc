"""Noise schedules and prediction types.

Forward process: x_t = alpha_t x0 + sigma_t eps. Two kinds:
- variance preserving (Ho et al. 2020, eq. 4): alpha_t^2 = abar_t, sigma_t^2 = 1 - abar_t, t = 0..T-1;
- rectified flow (Liu et al. 2022, eq. 1; Esser et al. 2024, eq. 13): alpha_t = 1 - t / T, sigma_t = t / T, t = 0..T,
  where t = 0 is the data itself and t = T pure noise.

Timesteps are always in the network's units: a flow network receives sigma * T (T = 1000).
"""

from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from models.errors import ModelError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = "FlowMatchEulerDiscreteScheduler"
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # DDIM's, with which we sample and export


def train_timesteps(config: dict) -> int:
    """The number of training timesteps in a scheduler configuration. Raises ModelError."""
    steps = config.get("num_train_timesteps", 1000)  # diffusers' default
    if type(steps) is not int or steps < 1:
        raise ModelError(f"scheduler: num_train_timesteps is {_shown(steps)}: set a whole number, such as 1000")
    return steps


def _alphas_cumprod(config: dict) -> Tensor:
    """The running product of 1 - beta, float32 [T], of a scheduler configuration with betas. Raises ModelError."""
    steps, trained, kind = train_timesteps(config), config.get("trained_betas"), config.get("beta_schedule", "linear")
    if trained is None and "beta_start" not in config:
        raise ModelError(f"scheduler: {config.get('_class_name')} has no betas: use a scheduler with betas, or {FLOW}")
    if trained is None and kind not in BETA_SCHEDULES:
        raise ModelError(
            f"scheduler: unknown beta_schedule {_shown(kind)}: use one of {', '.join(BETA_SCHEDULES)}, or trained_betas"
        )
    try:
        scheduler = DDPMScheduler.from_config(config)
        abar, betas = scheduler.alphas_cumprod.float(), scheduler.betas
        valid = betas.shape == (steps,) and bool(((betas >= 0) & (betas <= 1)).all())
    except (TypeError, ValueError, RuntimeError) as error:  # values that are no numbers
        raise ModelError(f"scheduler: no schedule can be made of its betas: {error}") from error
    if not valid:
        count = f"{len(abar)} of num_train_timesteps={steps}"
        raise ModelError(f"scheduler: its betas are not one number from 0 to 1 per timestep ({count}): correct them")
    return abar


def _shown(value: object) -> str:
    """A value as the JSON file has it, but quoted like the names beside it."""
    return f"'{value}'" if isinstance(value, str) else "null" if value is None else str(value)


@dataclass(frozen=True)
class Schedule:
    """A noise schedule and the prediction type of its networks.

    alphas, sigmas: alpha_t and sigma_t by timestep, float32 [last + 1].
    prediction: "epsilon", "v_prediction" (alpha eps - sigma x0, Salimans & Ho 2022, appendix D), "sample" (x0) or
    "flow" (eps - x0, Esser et al. 2024, eq. 8).
    first: the smallest training timestep.
    shift: of the training timesteps (see `timesteps`); the schedule itself does not depend on it.
    """

    alphas: Tensor
    sigmas: Tensor
    prediction: str
    first: int = 0
    shift: float = 1.0

    @classmethod
    def from_config(cls, config: dict, shift: float = 1.0) -> "Schedule":
        """The schedule of a diffusers scheduler configuration: any scheduler with betas, or flow matching.

        A flow scheduler's own `shift` spaces the sampling steps and is not part of the schedule. Raises ModelError for
        an unsupported scheduler or prediction type.
        """
        if config.get("_class_name") == FLOW:
            if config.get("use_dynamic_shifting"):
                raise ModelError("scheduler: use_dynamic_shifting is not supported: set it to false and set `shift`")
            steps = train_timesteps(config)
            sigmas = torch.arange(steps + 1) / steps
            return cls(1 - sigmas, sigmas, "flow", 1, shift)
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise ModelError(
                f"scheduler: unknown prediction_type {_shown(prediction)}: use one of {', '.join(PREDICTIONS)}, or a {FLOW}"
            )
        abar = _alphas_cumprod(config)
        if prediction == "epsilon" and float(abar[-1]) == 0:
            raise ModelError(
                "scheduler: with rescale_betas_zero_snr, epsilon does not determine x0 at the last timestep: use v_prediction"
            )
        return cls(abar.sqrt(), (1 - abar).sqrt(), prediction, 0, shift)

    @property
    def last(self) -> int:
        """The noisiest timestep: T - 1, or T (sigma = 1) for a flow."""
        return len(self.alphas) - 1

    @property
    def steps(self) -> int:
        """T, the number of training timesteps."""
        return self.last + 1 - self.first

    def to(self, device: torch.device) -> "Schedule":
        return replace(self, alphas=self.alphas.to(device), sigmas=self.sigmas.to(device))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for integer timesteps t of shape [B], each of shape [B, 1, 1, 1]."""
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def timesteps(self, uniform: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Training timesteps, int64 [B], from uniform draws u in [0, 1).

        u is shifted, u <- shift u / (1 + (shift - 1) u) (Esser et al. 2024, eq. 23: more noise for larger images), then
        t = low T + u (high T - low T), so that every t stays in the range.
        """
        u = self.shift * uniform / (1 + (self.shift - 1) * uniform)
        first, last = int(low * self.steps), int(high * self.steps)
        return (first + u * (last - first)).long().clamp(first, last - 1) + self.first

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of the forward process; x0 and noise of shape [B, C, H, W], t of shape [B]."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The regression target of a network of this prediction type at (x0, noise, t)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        if self.prediction == "flow":
            return noise - x0
        alpha, sigma = self.alpha_sigma(t)
        return alpha * noise - sigma * x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 implied by a network's prediction at (x_t, t)."""
        if self.prediction == "sample":
            return prediction
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction == "epsilon":
            return (x_t - sigma * prediction) / alpha
        if self.prediction == "flow":  # x_t - sigma (eps - x0) = (alpha + sigma) x0, and alpha + sigma = 1
            return x_t - sigma * prediction
        return alpha * x_t - sigma * prediction
