"""Score-distillation objectives: pure functions that return the gradient on x0.

The generator descends E[ w(t) (s_fake(x_t) - s_target(x_t)) dx0/dphi ] (DisBack, eq. 7; Diff-Instruct, eq. 3.2).
With s = -eps / sigma and eps = (x_t - alpha x0) / sigma, the score difference s_fake - s_target is
(eps_target - eps_fake) / sigma, and that is alpha / sigma^2 (x0_fake - x0_target). This holds on every schedule
x_t = alpha x0 + sigma eps, a flow's alpha = 1 - sigma too; there, with x0 = x_t - sigma v, the x0 difference is
sigma (v_target - v_fake).
A new objective takes one function here, one line in OBJECTIVES and its name in BacktrackSettings.objective.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """The inputs of the objectives for one noised generator batch; tensors are [B, C, H, W] unless noted."""

    x0: Tensor  # the generator's sample, detached
    target_x0: Tensor  # the target's (guided) estimate of x0 from x_t
    fake_x0: Tensor  # the fake score's estimate of x0 from x_t, never guided
    alpha: Tensor  # [B, 1, 1, 1]
    sigma: Tensor  # [B, 1, 1, 1]


def vsd(scores: Scores) -> Tensor:
    """Variational score distillation (Wang et al. 2023, eq. 9) with w(t) = sigma_t^2 on the noise difference:
    g = sigma^2 (eps_target - eps_fake) = sigma alpha (x0_fake - x0_target)."""
    return scores.sigma * scores.alpha * (scores.fake_x0 - scores.target_x0)


def dmd(scores: Scores) -> Tensor:
    """Distribution matching distillation (Yin et al. 2024, eq. 7-8), normalised per sample:
    g = (x0_fake - x0_target) / mean|x0 - x0_target|."""
    scale = (scores.x0 - scores.target_x0).abs().mean(dim=(1, 2, 3), keepdim=True)
    # The scale is 0 where the target agrees with the sample to the last bit.
    return (scores.fake_x0 - scores.target_x0) / scale.clamp_min(1e-8)


OBJECTIVES: dict[str, Callable[[Scores], Tensor]] = {"vsd": vsd, "dmd": dmd}
