"""A generator of one or more steps.

A generator of n steps has timesteps t_0 > ... > t_{n-1}. It starts from pure noise x_0; step k makes x0_k = G(x_k, t_k),
and x_{k+1} = alpha(t_{k+1}) x0_k + sigma(t_{k+1}) eps is x0_k with fresh noise. The last x0 is the image. One step at the
conditioning timestep is the one-step generator.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.conditioning import Conditioning
from models.denoise import generate
from models.diffusion import Schedule
from models.errors import ModelError
from models.noise import Draws


@dataclass(frozen=True)
class Student:
    """Steps of a generator on a schedule. timesteps: of its steps, falling. Raises ModelError for a timestep that the
    schedule does not have."""

    schedule: Schedule
    timesteps: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.timesteps[0] > self.schedule.last:
            raise ModelError(
                f"timestep {self.timesteps[0]} of the generator: the pipeline's schedule ends at {self.schedule.last}: "
                "set `conditioning_timestep` (or `backtrack.student_timesteps`) to a smaller one"
            )

    def renoise(self, x0: Tensor, eps: Tensor, k: int) -> Tensor:
        """The input of step k > 0, from the x0 of the step before; all [B, C, H, W]."""
        t = torch.full((len(x0),), self.timesteps[k], device=x0.device, dtype=torch.long)
        return self.schedule.add_noise(x0, eps, t)

    def trajectory(self, net: nn.Module, cond: Conditioning, draw: Callable[[int], Tensor], steps: int) -> list[Tensor]:
        """The x0 of each of the first `steps` steps. draw(k): the noise [B, C, H, W] in step k's input, called in
        order."""
        x0s: list[Tensor] = []
        for k in range(steps):
            x = self.renoise(x0s[-1], draw(k), k) if k else draw(0)
            x0s.append(generate(net, x, cond, self.schedule, self.timesteps[k]))
        return x0s

    def training_sample(self, net: nn.Module, cond: Conditioning, draws: Draws, shape: tuple[int, ...]) -> Tensor:
        """x0 [B, *shape] of a random step k. Steps 0 .. k-1 are the generator's own, without gradient (backward
        simulation), so that step k is trained on the inputs that it will see (DMD2, Yin et al. 2024, section 4.5). The
        last call carries a gradient unless the caller disables it.

        k is one draw for the whole global batch of a training step, as in DMD2: under ZeRO-3 each call gathers weights
        from all ranks, so all ranks must make the same number of calls. A k per sample would cost every rank all n
        calls; this costs (n + 1) / 2 on average. The noise is each sample's own.
        """
        k = draws.integer("student step", len(self.timesteps))

        def draw(j: int) -> Tensor:
            return draws.normal(f"z{j}" if j else "z", shape)

        with torch.no_grad():
            before = self.trajectory(net, cond, draw, k)
        x = self.renoise(before[-1], draw(k), k) if k else draw(0)
        return generate(net, x, cond, self.schedule, self.timesteps[k])

    def every_step(
        self, net: nn.Module, cond: Conditioning, draws: Draws, stream: str, shape: tuple[int, ...]
    ) -> Tensor:
        """x0 [B, *shape] of step i mod n for sample i: a fixed set of samples in which all steps have an equal share.
        Every step runs for every sample, so that all ranks make the same calls."""
        x0s = self.trajectory(net, cond, lambda k: draws.normal(f"{stream}{k or ''}", shape), len(self.timesteps))
        return torch.stack([x0s[i % len(x0s)][row] for row, i in enumerate(draws.index)])
