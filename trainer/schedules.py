"""Learning rates as a pure function of the step, so that there is no scheduler state to save."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class OptimizerSettings(BaseModel):
    """AdamW and its learning rate. The rate warms up linearly over `warmup` steps, then is constant or falls to zero
    along a half cosine at the end of training."""

    model_config = ConfigDict(extra="forbid")

    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(0, ge=0)
    decay: Literal["constant", "cosine"] = "constant"


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """The learning rate of the update at `step` (from 0) of `steps`."""
    rate = settings.lr
    if step < settings.warmup:
        rate *= (step + 1) / settings.warmup
    if settings.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    return rate
