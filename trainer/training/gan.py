"""The GAN term in backtracking: what is real, what is noised how, and the two losses (see models.gan)."""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from data.loader import Batch
from models.conditioning import Conditioning
from models.denoise import predict
from models.gan import generator_gradient, head_loss, judged
from models.noise import SampleNoise
from models.sampler import Sampler
from models.settings import GanSettings
from trainer.engine.role import Role
from trainer.training.inputs import batch_latents
from trainer.training.metrics import Meters


class Adversary:
    """The head on the fake score's features. `fake_score` is a role whose network is a Discriminator."""

    def __init__(self, settings: GanSettings, fake_score: Role, sampler: Sampler, noise: SampleNoise):
        self.settings, self.fake_score, self.noise = settings, fake_score, noise
        self.sampler, self.schedule = sampler, sampler.schedule

    def _noised(self, x0: Tensor, stream: str, step: int, index: list[int]) -> tuple[Tensor, Tensor]:
        """x_t and t of samples noised for the head alone."""
        t = self.schedule.timesteps(self.noise.uniform(f"{stream} t", step, index), *self.settings.timesteps)
        eps = self.noise.normal(f"{stream} eps", step, index, tuple(x0.shape[1:]))
        return self.schedule.add_noise(x0, eps, t), t

    def push(
        self, x0: Tensor, eps: Tensor, t: Tensor, cond: Conditioning, step: int, index: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """On generated samples x0 (detached) noised with eps to t: the fake score's prediction there, the GAN's part of
        the gradient on x0, and its loss. Shared: one pass gives all.

        The bare network is called for what needs autograd to the sample: an engine's hooks would begin a reduction of
        gradients that nobody asked for, and the parameters would get some.
        """
        leaf, net = x0.detach().requires_grad_(), self.fake_score.module
        if self.settings.shared_pass:
            fake, logits = judged(net, self.schedule.add_noise(leaf, eps, t), t, cond, "aside")
        else:
            with torch.no_grad():
                fake = predict(self.fake_score, self.schedule.add_noise(x0, eps, t), t, cond)
            x_t, own_t = self._noised(leaf, "gan", step, index)
            _, logits = judged(net, x_t, own_t, cond, "only")
        return fake, *generator_gradient(logits, leaf, self.settings.generator_weight)

    def update_loss(
        self,
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        cond: Conditioning,
        real_cond: Conditioning,
        step: int,
        batch: Batch,
        meters: Meters,
    ) -> Tensor:
        """The fake score's loss with the head's: denoising of x0 at t plus, weighted, real against generated.

        Real samples have their own captions, but the generator's time ids: the head would otherwise tell images apart by
        the sizes that they are said to have.
        """
        x_t, target = self.schedule.add_noise(x0, eps, t), self.schedule.target(x0, eps, t)
        if self.settings.shared_pass:
            prediction, fake_logits = judged(self.fake_score, x_t, t, cond, "also")
        else:
            prediction = predict(self.fake_score, x_t, t, cond)
            _, fake_logits = judged(self.fake_score, *self._noised(x0, "gan fake", step, batch.index), cond, "only")
        posterior = self.noise.normal("real posterior", step, batch.index, tuple(x0.shape[1:]))
        real = batch_latents(batch, self.sampler, posterior)
        real_logits = judged(self.fake_score, *self._noised(real, "real", step, batch.index), real_cond, "only")[1]
        denoising, head = mse_loss(prediction, target), head_loss(fake_logits, real_logits)
        meters.add("loss/fake_score", denoising)
        meters.add("loss/gan_head", head)
        return denoising + self.settings.head_weight * head
