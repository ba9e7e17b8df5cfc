"""The diffusion-GAN term of DMD2 (Yin et al. 2024, section 4.3): a classifier head on the fake score's own features.

The head D classifies noised samples as real or generated from the fake score's bottleneck features:

    head       L_D = softplus(D(x_t)) on generated samples + softplus(-D(x_t)) on real ones
    generator  L_G = softplus(-D(x_t)) on generated samples

**Normalisation.** DMD2's generator loss is 0.5 mean_e((x0 - sg(x0 - g))^2) + w mean_b(L_G): a mean over the E = B n
elements of the batch (n per sample) for the score part, over the B samples for the GAN part. Its gradient on x0 is
g / E + (w / B) dL_G/dx0. Here a gradient g on x0 enters the generator as mean_e(x0 g), that is as g / E. So the GAN's
part of g is w n dL_G/dx0, with L_G the loss of one sample; DMD2's published weights then have the same meaning here.
The head's weighted loss is added to the denoising loss, in both a mean over elements.
"""

from math import gcd
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import softplus

from models.conditioning import Conditioning
from models.denoise import call
from models.errors import ModelError


def feature_module(network: nn.Module) -> nn.Module:
    """The module whose output the head reads: a UNet's bottleneck. Raises ModelError for a network without one."""
    if getattr(network, "mid_block", None) is None:
        raise ModelError(f"gan: {type(network).__name__} has no mid_block for the head to read: set gan.enabled=false")
    return network.mid_block


def feature_shape(network: nn.Module, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(channels, height, width) of the features for latents (C, H, W). Each level of a UNet but the last halves the
    sides, rounding up."""
    channels = network.config.block_out_channels
    height, width = latent_shape[1:]
    for _ in channels[1:]:
        height, width = -(-height // 2), -(-width // 2)
    return channels[-1], height, width


def unet_features(
    unet: UNet2DConditionModel, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict | None
) -> Tensor:
    """The bottleneck features [B, C, h, w] of a text-to-image UNet, computed without its decoder: 40% of the FLOP of an
    SDXL pass. Same operations in the same order as in UNet2DConditionModel.forward."""
    emb = unet.time_embedding(unet.get_time_embed(sample=x_t, timestep=t))
    added = unet.get_aug_embed(emb, encoder_hidden_states, added_cond_kwargs)
    emb = emb if added is None else emb + added
    states = unet.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)
    x = unet.conv_in(x_t)
    for block in unet.down_blocks:
        more = {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
        x, _ = block(x, emb, **more)
    return unet.mid_block(x, emb, encoder_hidden_states=states)


def _has_plain_encoder(network: nn.Module) -> bool:
    """Whether `unet_features` computes this network's features: a UNet without any of diffusers' optional inputs."""
    config = network.config
    return (
        isinstance(network, UNet2DConditionModel)
        and getattr(network.mid_block, "has_cross_attention", False)
        and config.addition_embed_type in (None, "text_time", "text")
        and not (config.class_embed_type or config.center_input_sample or config.time_embedding_act_fn)
    )


class Head(nn.Sequential):
    """Maps features [B, C, h, w] to logits [B, 1, h', w'], one per patch: DMD2's head for SDXL (32 x 32 features to
    2 x 2 patches), with as many of its halving stages as the feature size allows."""

    def __init__(self, channels: int, height: int, width: int):
        layers: list[nn.Module] = []
        stages = [(4, 2, 1), (4, 2, 1), (4, 4, 0)]  # kernel, stride, padding
        side = min(height, width)
        for kernel, stride, padding in stages if side >= 4 else [(1, 1, 0)]:
            if side < kernel:
                break
            groups = gcd(32, max(channels // 8, 1))  # at least eight channels per group: one value has no variance
            conv = nn.Conv2d(channels, channels, kernel, stride, padding)
            layers += [conv, nn.GroupNorm(groups, channels), nn.SiLU()]
            side = (side + 2 * padding - kernel) // stride + 1
        super().__init__(*layers, nn.Conv2d(channels, 1, 1))


class Discriminator(nn.Module):
    """The fake score's network and the head in one module: one engine, one optimizer, one checkpoint. Parameters are
    named `network.*` and `head.*`; weights are loaded, strictly, before the network is wrapped.

    The head is initialised from `seed` alone, on the CPU: the same on every rank and for every sharding.
    """

    def __init__(self, network: nn.Module, latent_shape: tuple[int, int, int], seed: int):
        super().__init__()
        self.network = network
        self._middle = [feature_module(network)]  # in a list, so that it is not registered a second time
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = Head(*feature_shape(network, latent_shape))
        self._plain = _has_plain_encoder(network)

    @property
    def config(self) -> dict:
        return self.network.config

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        with_logits: bool = False,
        decoder: Literal["grad", "no_grad", "skip"] = "grad",
        **inputs: object,
    ) -> tuple[Tensor | None, ...]:
        """The network's outputs or, with logits, the pair (prediction, logits).

        decoder: "no_grad" runs the network behind its bottleneck without autograd, so that it saves no activations:
        only the logits carry a gradient. "skip" returns None as the prediction and, if possible, does not run the
        decoder.
        """
        if not with_logits:
            return self.network(x_t, t, **inputs)
        if decoder == "skip" and self._plain:
            names = ("encoder_hidden_states", "added_cond_kwargs")
            return None, self.head(unet_features(self.network, x_t, t, *(inputs.get(name) for name in names)))
        features: list[Tensor] = []
        grad = torch.is_grad_enabled()

        def at_bottleneck(module: nn.Module, args: tuple, output: Tensor) -> None:
            features.append(output)
            if decoder != "grad":
                torch.set_grad_enabled(False)  # only the decoder runs after this

        hook = self._middle[0].register_forward_hook(at_bottleneck)
        try:
            prediction = self.network(x_t, t, **inputs)[0]
        finally:
            hook.remove()
            torch.set_grad_enabled(grad)
        return None if decoder == "skip" else prediction, self.head(features[0])


def predict_with_logits(
    net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, decoder_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """Prediction [B, C, H, W] and logits [B, patches] in float32 from one pass of a Discriminator or its engine.

    decoder_grad: False runs the decoder without autograd: only the logits carry a gradient, and only the encoder's
    activations are saved.
    """
    decoder = "grad" if decoder_grad else "no_grad"
    prediction, logits = call(net, x_t, t, cond, with_logits=True, decoder=decoder)
    return prediction.float(), logits.float().flatten(1)


def head_logits(net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Logits [B, patches] in float32 of a Discriminator or its engine, if possible without running the decoder."""
    return call(net, x_t, t, cond, with_logits=True, decoder="skip")[1].float().flatten(1)


def head_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """softplus(D(fake)) + softplus(-D(real)), each a mean over samples and patches; a scalar."""
    return softplus(fake_logits).mean() + softplus(-real_logits).mean()


def generator_gradient(logits: Tensor, x0: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The GAN's part of the gradient on x0 [B, C, H, W], scaled as in the module's docstring, and the loss, a scalar.

    logits: [B, patches] of generated samples, with a graph back to x0.
    """
    losses = softplus(-logits).mean(1)
    (gradient,) = torch.autograd.grad(losses.sum(), x0)
    return weight * x0[0].numel() * gradient, losses.detach().mean()
