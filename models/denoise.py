"""Calls of denoising networks: every forward pass of a denoiser, and every change of precision, is here.

`net` is a DeepSpeed engine or a plain network; models.families builds its arguments. Schedules and objectives compute
in float32, the network in its own dtype.
"""

import torch
from torch import Tensor, nn

from models.conditioning import Conditioning
from models.diffusion import Schedule
from models.families import FAMILIES


def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, **more: object) -> tuple:
    """The network's outputs at x_t [B, C, H, W] and t [B] in its own dtype; the first is the raw prediction."""
    dtype = getattr(net, "module", net).dtype
    arguments, named = FAMILIES[cond.family].inputs(x_t.to(dtype), t, cond)
    return net(*arguments, **named, return_dict=False, **more)


def predict(net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The network's raw prediction at x_t [B, C, H, W] and t [B], as float32 [B, C, H, W]."""
    return call(net, x_t, t, cond)[0].float()


def predict_guided(
    net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float, one_call: bool = True
) -> tuple[Tensor, Tensor]:
    """The prediction with classifier-free guidance (Ho & Salimans 2022), and the conditional one.

    guided = uncond + scale (cond - uncond). One call with a doubled batch is faster than two (one_call=False), which
    need half the memory. A scale of 1 takes one plain call.
    """
    if guidance_scale == 1.0:
        conditional = predict(net, x_t, t, cond)
        return conditional, conditional
    if one_call:
        both = predict(net, torch.cat([x_t, x_t]), torch.cat([t, t]), cond.doubled())
        empty, conditional = both.chunk(2)
    else:
        empty, conditional = predict(net, x_t, t, cond.unconditional()), predict(net, x_t, t, cond)
    return empty + guidance_scale * (conditional - empty), conditional


def generate(net: nn.Module, z: Tensor, cond: Conditioning, schedule: Schedule, timestep: int) -> Tensor:
    """One step of a generator: x0 = G(z, c) at the conditioning timestep t_g (DisBack, section 3; for epsilon
    prediction x0 = (z - sigma(t_g) eps_G(z, t_g, c)) / alpha(t_g), for flow at sigma = 1 x0 = z - v_G(z, t_g, c)).

    z: [B, C, H, W], standard normal for the first step; for later steps of a generator with several, the noised sample.
    """
    t = torch.full((len(z),), timestep, device=z.device, dtype=torch.long)
    return schedule.to_x0(predict(net, z, t, cond), z, t)


def denoising_loss(
    net: nn.Module, schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor, cond: Conditioning
) -> Tensor:
    """Denoising score matching (DisBack, eq. 4): the mean squared error of the network's prediction at x_t, a scalar.

    x0, noise: [B, C, H, W]; t: [B].
    """
    prediction = predict(net, schedule.add_noise(x0, noise, t), t, cond)
    return torch.nn.functional.mse_loss(prediction, schedule.target(x0, noise, t))
