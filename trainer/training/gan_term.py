"""The GAN term of backtracking: what counts as real, what is noised how, and the two losses (see models.gan)."""

from torch import Tensor, no_grad
from torch.nn.functional import mse_loss

from data.loader import Batch
from models.conditioning import Conditioning
from models.denoise import predict
from models.gan import generator_gradient, head_logits, head_loss, predict_with_logits
from models.noise import Draws
from models.sampler import Sampler
from models.settings import GanSettings
from trainer.engine.role import Role
from trainer.training.inputs import batch_latents


class GanTerm:
    """The head on the fake score's features. fake_score: a role whose network is a Discriminator."""

    def __init__(self, settings: GanSettings, fake_score: Role, sampler: Sampler):
        self.settings, self.fake_score = settings, fake_score
        self.sampler, self.schedule = sampler, sampler.schedule

    def generator_term(
        self, x0: Tensor, eps: Tensor, t: Tensor, cond: Conditioning, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor]:
        """On generated samples x0 (detached) noised with eps to t: the fake score's prediction, the GAN's part of the
        gradient on x0, and its loss. With `gan.shared_pass`, one pass gives all three.

        It calls the bare network: an engine's hooks would start a gradient reduction for a graph that leads to the sample
        only, and its parameters would get gradients.
        """
        leaf, network = x0.detach().requires_grad_(), self.fake_score.module
        if self.settings.shared_pass:
            x_t = self.schedule.add_noise(leaf, eps, t)
            fake, logits = predict_with_logits(network, x_t, t, cond, decoder_grad=False)
        else:
            with no_grad():
                fake = predict(self.fake_score, self.schedule.add_noise(x0, eps, t), t, cond)
            logits = head_logits(network, *self._noised(leaf, "gan", draws), cond)
        return fake, *generator_gradient(logits, leaf, self.settings.generator_weight)

    def fake_score_losses(
        self,
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        cond: Conditioning,
        real: Batch,
        real_cond: Conditioning,
        draws: Draws,
    ) -> tuple[Tensor, Tensor]:
        """The denoising loss on generated samples at t, and the head's loss, real against generated.

        Real samples have their own captions but the generator's time ids: the head would otherwise tell images apart by
        their stated sizes.
        """
        # Before there is a graph: encoding images takes gigabytes, next to a graph on top of its activations. Reused samples may
        # be of another bucket than the real ones: the head sees each by itself.
        shape = self.sampler.shape_of(real.size or self.sampler.size)
        latents = batch_latents(real, self.sampler, draws.normal("real posterior", shape))
        x_t, target = self.schedule.add_noise(x0, eps, t), self.schedule.target(x0, eps, t)
        if self.settings.shared_pass:
            prediction, fake_logits = predict_with_logits(self.fake_score, x_t, t, cond)
        else:
            prediction = predict(self.fake_score, x_t, t, cond)
            fake_logits = head_logits(self.fake_score, *self._noised(x0, "gan fake", draws), cond)
        real_logits = head_logits(self.fake_score, *self._noised(latents, "real", draws), real_cond)
        return mse_loss(prediction, target), head_loss(fake_logits, real_logits)

    def _noised(self, x0: Tensor, stream: str, draws: Draws) -> tuple[Tensor, Tensor]:
        """x_t and t of samples noised for the head alone."""
        t = self.schedule.timesteps(draws.uniform(f"{stream} t"), *self.settings.timesteps)
        return self.schedule.add_noise(x0, draws.normal(f"{stream} eps", tuple(x0.shape[1:])), t), t
