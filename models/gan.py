"""The diffusion-GAN term of DMD2 (Yin et al. 2024, section 4.3): a classifier head on the fake score's own features.

The head D reads the bottleneck features of the fake score at a noised sample, and tells real from generated ones:

    head       L_D = softplus(D(x_t)) on generated samples + softplus(-D(x_t)) on real ones
    generator  L_G = softplus(-D(x_t)) on generated samples

**Normalisation.** DMD2's generator loss is 0.5 mean_e((x0 - sg(x0 - g))^2) + w mean_b(L_G): a mean over the E = B n
elements of the batch (n a sample) for the score part, over the B samples for the GAN part. Its gradient on x0 is
g / E + (w / B) dL_G/dx0. Here a gradient g on x0 enters the generator as mean_e(x0 g), that is as g / E. So the GAN's
part of g is w n dL_G/dx0, L_G being one sample's own loss: then DMD2's published weights mean here what they mean there.
The head's loss is added, weighted, to the denoising loss, a mean over elements in both.
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


def no_features(kind: str) -> str:
    return f"gan: {kind} has no mid_block for the head to read: set gan.enabled=false"


def feature_module(network: nn.Module) -> nn.Module:
    """The part of a network whose output the head reads: a UNet's bottleneck. A backbone without one would give its
    middle block here. Raises ModelError."""
    middle = getattr(network, "mid_block", None)
    if middle is None:
        raise ModelError(no_features(type(network).__name__))
    return middle


def feature_shape(network: nn.Module, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(channels, height, width) of the features for latents (C, H, W); each of a UNet's stages but the last halves the
    sides, rounding up."""
    channels = network.config.block_out_channels
    height, width = latent_shape[1:]
    for _ in channels[1:]:
        height, width = -(-height // 2), -(-width // 2)
    return channels[-1], height, width


def unet_features(
    unet: UNet2DConditionModel, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict | None
) -> Tensor:
    """The bottleneck features [B, C, h, w] of a text-to-image UNet without running its decoder: 0.4 of SDXL's pass. The
    same operations in the same order as UNet2DConditionModel.forward."""
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
    """Whether `unet_features` is this network's encoder: nothing of what some UNets add to it."""
    config = network.config
    return (
        isinstance(network, UNet2DConditionModel)
        and getattr(network.mid_block, "has_cross_attention", False)
        and config.addition_embed_type in (None, "text_time", "text")
        and not (config.class_embed_type or config.center_input_sample or config.time_embedding_act_fn)
    )


class Head(nn.Sequential):
    """Features [B, C, h, w] to logits [B, 1, h', w'], one a patch: DMD2's head for SDXL (32 x 32 features to 2 x 2
    patches), with as many of its halving stages as the features have room for."""

    def __init__(self, channels: int, height: int, width: int):
        layers: list[nn.Module] = []
        stages = [(4, 2, 1), (4, 2, 1), (4, 4, 0)]  # kernel, stride, padding
        side = min(height, width)
        for kernel, stride, padding in stages if side >= 4 else [(1, 1, 0)]:
            if side < kernel:
                break
            groups = gcd(32, max(channels // 8, 1))  # eight channels a group at least: one value has no variance
            conv = nn.Conv2d(channels, channels, kernel, stride, padding)
            layers += [conv, nn.GroupNorm(groups, channels), nn.SiLU()]
            side = (side + 2 * padding - kernel) // stride + 1
        super().__init__(*layers, nn.Conv2d(channels, 1, 1))


class Discriminator(nn.Module):
    """The fake score's network and the head in one module: one engine, one optimizer, one checkpoint. The network's
    parameters are `network.*`, the head's `head.*`; the network is loaded, strictly, before it is wrapped.

    The head is drawn from `seed` alone, on the CPU: the same on every rank and for every sharding.
    """

    def __init__(self, network: nn.Module, latent_shape: tuple[int, int, int], seed: int):
        super().__init__()
        self.network = network
        self._middle = [feature_module(network)]  # in a list: it is registered once, inside the network
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
        self, x_t: Tensor, t: Tensor, judge: Literal["", "also", "aside", "only"] = "", **inputs: object
    ) -> tuple[Tensor | None, ...]:
        """The network's outputs; with `judge` the pair (prediction, logits).

        also: one pass for both. aside: the same, but the prediction carries no gradient and the decoder keeps no
        activations. only: logits alone (the prediction is None), without the decoder where the network allows it.
        """
        if not judge:
            return self.network(x_t, t, **inputs)
        if judge == "only" and self._plain:
            names = ("encoder_hidden_states", "added_cond_kwargs")
            return None, self.head(unet_features(self.network, x_t, t, *(inputs.get(name) for name in names)))
        caught: list[Tensor] = []
        grad = torch.is_grad_enabled()

        def catch(module: nn.Module, args: tuple, output: Tensor) -> None:
            caught.append(output)
            if judge != "also":
                torch.set_grad_enabled(False)  # what follows is the decoder, and nobody asks for its gradient

        hook = self._middle[0].register_forward_hook(catch)
        try:
            prediction = self.network(x_t, t, **inputs)[0]
        finally:
            hook.remove()
            torch.set_grad_enabled(grad)
        return None if judge == "only" else prediction, self.head(caught[0])


def judged(
    net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, judge: Literal["also", "aside", "only"]
) -> tuple[Tensor | None, Tensor]:
    """(prediction [B, C, H, W] or None, logits [B, patches]) in float32, of a Discriminator or its engine."""
    prediction, logits = call(net, x_t, t, cond, judge=judge)
    return None if prediction is None else prediction.float(), logits.float().flatten(1)


def head_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """softplus(D(fake)) + softplus(-D(real)), means over samples and patches; a scalar."""
    return softplus(fake_logits).mean() + softplus(-real_logits).mean()


def generator_gradient(logits: Tensor, x0: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The GAN's part of the gradient on x0 [B, C, H, W] (see the module's text for its scale), and the loss, a scalar.

    logits: [B, patches] of generated samples, with a graph that leads to x0 and to nothing that is trained.
    """
    losses = softplus(-logits).mean(1)
    (gradient,) = torch.autograd.grad(losses.sum(), x0)
    return weight * x0[0].numel() * gradient, losses.detach().mean()
