"""Training of the miniature's autoencoder: a stage before the teacher's, through the same loop."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.pipeline import load_vae
from trainer.config.deepspeed import deepspeed_config
from trainer.distributed.world import barrier
from trainer.engine.role import Role
from trainer.training.loop import train
from trainer.training.preview import grid
from trainer.training.run import Run
from trainer.training.stage import Stage


class Reconstruction(nn.Module):
    """Encoder, posterior sample and decoder in one forward pass, as an engine needs it."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] and posterior noise to reconstructions [B, 3, H, W] and KL divergences [B]."""
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * eps).sample, posterior.kl()


class AutoencoderTraining(Stage):
    """Mean squared error of reconstructions plus a small KL term."""

    def __init__(self, run: Run, start: Path):
        settings = run.settings.pretrain.autoencoder
        super().__init__("autoencoder", run, settings, ("image", "caption"), "pretrain.autoencoder")
        self.sampler = run.sampler(start)
        # float32 always: it is small, and the teacher would inherit its errors.
        config = deepspeed_config("zero0", self.micro, settings.accumulation, settings.clip, "fp32", run.world.size)
        network = Reconstruction(load_vae(start))
        self.autoencoder = self.add_role(Role("autoencoder", network, config, run.world, settings.optimizer))

    def update(self, step: int) -> None:
        rate = self.rates(step)["autoencoder"]
        for batch in self.micro_batches():
            images = batch.images.to(self.world.device, non_blocking=True)
            eps = self.noise.at(step, batch.index).normal("posterior", self.sampler.shape_of(tuple(images.shape[2:])))
            output, kl = self.autoencoder(images, eps)
            error = nn.functional.mse_loss(output, images)
            self.meters.add("loss/autoencoder", error)
            self.autoencoder.step(error + self.settings.kl * kl.mean() / eps[0].numel(), rate)

    def preview(self) -> Tensor:
        """Real images above their reconstructions."""
        real = torch.stack([self.dataset.example(i)["image"] for i in range(16)]).to(self.world.device)
        with torch.no_grad():
            shape = self.sampler.shape_of(tuple(real.shape[2:]))
            output, _ = self.autoencoder(real, torch.zeros(16, *shape, device=self.world.device))
        both = torch.cat([real, output.clamp(-1, 1)])
        return grid(((both + 1) * 127.5).round().to(torch.uint8), self.run.settings.sample.enlarge)

    def write(self, folder: Path) -> float:
        """Writes the autoencoder with the scaling factor that gives its latents unit variance, as Stable Diffusion's
        has; returns the factor."""
        vae = self.autoencoder.module.vae
        vae.eval()
        rows = range(min(len(self.dataset), 1024))
        with torch.no_grad():
            images = torch.stack([self.dataset.example(i)["image"] for i in rows]).to(self.world.device)
            scale = 1 / float(torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)]).std())
        if self.world.main:
            vae.register_to_config(scaling_factor=scale)
            vae.save_pretrained(folder, safe_serialization=True)
        barrier(self.world)
        return scale


def train_autoencoder(run: Run, start: Path) -> tuple[Path, float]:
    """Trains the autoencoder of the pipeline folder `start`; returns its folder and scaling factor."""
    folder = run.stage_folder("autoencoder")
    stage = AutoencoderTraining(run, start)
    train(stage, run.settings.pretrain.autoencoder.loop, run.settings.health, folder, run.world)
    scale = stage.write(folder / "vae")
    return folder / "vae", scale
