"""A bare backtracking cycle: plain modules, torch's optimizer, one batch in memory."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from models.conditioning import Conditioning
from models.denoise import predict
from models.gan import Discriminator, generator_gradient, head_logits, head_loss, predict_with_logits
from models.pipeline import load_network, load_vae
from models.text_encoder import TextEncoder
from trainer.training.run import Run


class Minimal:
    """The mathematics of a run's settings, which must be float32, one sample per step and reused samples."""

    def __init__(self, run: Run, shape: tuple[int, int, int]):
        self.settings, self.gan, pipeline = run.settings.backtrack, run.settings.gan, Path(run.settings.pipeline)
        self.networks = [load_network(pipeline / "unet") for _ in range(3)]
        self.teacher, self.generator, self.fake = self.networks
        self.teacher.requires_grad_(False)
        if run.settings.network.checkpointing:
            for trained in (self.generator, self.fake):
                trained.enable_gradient_checkpointing()
        if self.gan.enabled:
            self.fake = self.networks[2] = Discriminator(self.fake, shape, seed=0)
            self.vae, self.image = load_vae(pipeline), torch.zeros(1, 3, *(run.settings.data.resolution,) * 2)
        sampler = run.sampler(pipeline)
        self.text: TextEncoder = sampler.text
        self.schedule, self.shape, self.size = sampler.schedule, (1, *shape), sampler.size
        self.t_g = torch.tensor([run.settings.conditioning_timestep])
        lr = self.settings.generator.lr
        self.adam = {n: torch.optim.AdamW(n.parameters(), lr=lr, fused=True) for n in (self.generator, self.fake)}
        self.ema = [p.detach().clone() for p in self.generator.parameters()]

    def update(self, net: nn.Module, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), self.settings.clip)
        self.adam[net].step()
        self.adam[net].zero_grad(set_to_none=True)

    def noised(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, eps = torch.randint(20, 980, (1,)), torch.randn(self.shape)
        return self.schedule.add_noise(x0, eps, t), eps, t

    def fake_at(self, sample: Tensor, eps: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor | float]:
        """The fake score's prediction, and the GAN's part of the gradient on the sample, from one pass."""
        if not self.gan.enabled:
            with torch.no_grad():
                return predict(self.fake, self.schedule.add_noise(sample, eps, t), t, cond), 0.0
        leaf = sample.detach().requires_grad_()
        x_t = self.schedule.add_noise(leaf, eps, t)
        fake, logits = predict_with_logits(self.fake, x_t, t, cond, decoder_grad=False)
        return fake, generator_gradient(logits, leaf, self.gan.generator_weight)[0]

    def fake_loss(self, sample: Tensor, cond: Conditioning, real_cond: Conditioning | None) -> Tensor:
        x_t, eps, t = self.noised(sample)
        if not self.gan.enabled:
            return mse_loss(predict(self.fake, x_t, t, cond), eps)
        with torch.no_grad():
            posterior = self.vae.encode(self.image).latent_dist
            real = (posterior.mean + posterior.std * torch.randn(self.shape)) * self.vae.config.scaling_factor
            real_cond = real_cond or self.text.encode(["a caption"], self.size)
        prediction, generated = predict_with_logits(self.fake, x_t, t, cond)
        x_t, _, t = self.noised(real)
        head = head_loss(generated, head_logits(self.fake, x_t, t, real_cond))
        return mse_loss(prediction, eps) + self.gan.head_weight * head

    def cycle(self) -> None:
        """One generator update and `fake_updates` fake-score updates."""
        cond = self.text.encode(["a caption"], self.size)
        z = torch.randn(self.shape)
        x0 = self.schedule.to_x0(predict(self.generator, z, self.t_g, cond), z, self.t_g)
        sample = x0.detach()
        x_t, eps, t = self.noised(sample)
        fake, push = self.fake_at(sample, eps, t, cond)
        with torch.no_grad():
            both = predict(self.teacher, x_t.repeat(2, 1, 1, 1), t.repeat(2), cond.doubled())
            empty, full = both.chunk(2)
            real = self.schedule.to_x0(empty + self.settings.guidance_scale * (full - empty), x_t, t)
            score = (self.schedule.to_x0(fake, x_t, t) - real) / (sample - real).abs().mean()
        self.update(self.generator, (x0 * (score + push)).mean())
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.generator.parameters()), 1 - self.settings.ema)
        for number in range(self.settings.fake_updates):
            # The generator's batch comes first; later real images have their own captions.
            self.update(self.fake, self.fake_loss(sample, cond, None if number else cond))


class Bare(Minimal):
    """Only the network calls of the cycle, forward and backward."""

    def update(self, net: nn.Module, loss: Tensor) -> None:
        loss.backward()
        net.zero_grad(set_to_none=True)
