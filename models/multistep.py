"""The generator as a student of one or more steps.

A student of n steps has timesteps t_0 > ... > t_{n-1}. It starts from pure noise x_0; step k makes x0_k = G(x_k, t_k),
and x_{k+1} = alpha(t_{k+1}) x0_k + sigma(t_{k+1}) eps is x0_k noised again with fresh noise. The last x0 is the image.
One step at the conditioning timestep is the one-step generator.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.conditioning import Conditioning
from models.denoise import generate
from models.diffusion import Schedule
from models.errors import ModelError
from models.noise import SampleNoise


@dataclass(frozen=True)
class Student:
    """timesteps: of the steps, falling. Raises ModelError for one that the schedule does not have."""

    schedule: Schedule
    timesteps: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.timesteps[0] > self.schedule.last:
            raise ModelError(
                f"timestep {self.timesteps[0]} of the generator: the pipeline's schedule ends at {self.schedule.last}: "
                "set `conditioning_timestep` (or `backtrack.student_timesteps`) to a smaller one"
            )

    def renoise(self, x0: Tensor, eps: Tensor, k: int) -> Tensor:
        """The input of step k > 0 from the x0 of the step before; all [B, C, H, W]."""
        t = torch.full((len(x0),), self.timesteps[k], device=x0.device, dtype=torch.long)
        return self.schedule.add_noise(x0, eps, t)

    def trajectory(self, net: nn.Module, cond: Conditioning, draw: Callable[[int], Tensor], steps: int) -> list[Tensor]:
        """The x0 of each of the first `steps` steps; draw(k) is the noise [B, C, H, W] that step k's input is made of,
        called in order."""
        x0s: list[Tensor] = []
        for k in range(steps):
            x = self.renoise(x0s[-1], draw(k), k) if k else draw(0)
            x0s.append(generate(net, x, cond, self.schedule, self.timesteps[k]))
        return x0s

    def training_sample(
        self,
        net: nn.Module,
        cond: Conditioning,
        noise: SampleNoise,
        step: int,
        index: list[int],
        shape: tuple[int, ...],
    ) -> Tensor:
        """x0 [B, *shape] of a random step k, whose input comes from backward simulation: steps 0 .. k-1 are the
        student's own, without gradient, so that it is trained on the inputs that it will see (DMD2, Yin et al. 2024,
        section 4.5). The last call carries a gradient if the caller wants one.

        k is one draw for the whole global batch of a training step, as in DMD2: under ZeRO-3 each call gathers weights
        from all ranks, so all must make the same number of calls; k of each sample's own would cost every rank all n
        calls, this costs (n + 1) / 2 on average. Noise is each sample's own.
        """
        k = noise.integer("student step", step, len(self.timesteps))

        def draw(j: int) -> Tensor:
            return noise.normal(f"z{j}" if j else "z", step, index, shape)

        with torch.no_grad():
            before = self.trajectory(net, cond, draw, k)
        x = self.renoise(before[-1], draw(k), k) if k else draw(0)
        return generate(net, x, cond, self.schedule, self.timesteps[k])

    def every_step(
        self,
        net: nn.Module,
        cond: Conditioning,
        noise: SampleNoise,
        stream: str,
        index: list[int],
        shape: tuple[int, ...],
    ) -> Tensor:
        """x0 [B, *shape] of step i mod n for sample i: a fixed set of samples on which all steps have an equal part. Every
        step is run for every sample, so that all ranks make the same calls."""
        x0s = self.trajectory(
            net, cond, lambda k: noise.normal(f"{stream}{k or ''}", 0, index, shape), len(self.timesteps)
        )
        return torch.stack([x0s[i % len(x0s)][row] for row, i in enumerate(index)])
