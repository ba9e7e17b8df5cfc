"""FLOP of an average training step per sample: one cost model, for the metrics of a run and for `disback plan`.

Pure functions of the settings. They count passes of the denoisers and of the GAN head; text encoders, autoencoder,
probes and previews are left out. A backward pass costs twice its forward pass: gradients of activations and of weights.
Where only one of the two is needed, it costs as much as the forward pass: with LoRA, whose few weights are counted
separately, and back to the sample alone.

cost: forward passes of one sample, as `models.profile.pass_flops` measures them. recompute: adds the second forward pass
of activation checkpointing. It takes time, so the plan counts it; it is not work of the model, so MFU does not.
"""

import re
from typing import TYPE_CHECKING

from trainer.config.schema import RunSettings

if TYPE_CHECKING:  # `disback plan --help` shows PEAK_TFLOPS without importing torch
    from models.profile import PassFlops

# Dense tensor-core peaks of bf16 (V100: of fp16), TFLOP/s, from NVIDIA's data sheets, halved where these count sparsity. PCIe
# and NVL cards have less than the SXM modules that a bare name stands for.
PEAK_TFLOPS = {
    "GH200": 989.0,
    "H200 NVL": 835.5,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A40": 149.7,
    "V100-PCIE": 112.0,
    "V100": 125.0,
}


def card_peak(device: str) -> float | None:
    """The peak of a device by its name as PyTorch tells it; None for one that is not listed (an A4000 is no A40) and for a
    part of one (MIG)."""
    if "MIG" in device:
        return None
    known = (peak for model, peak in PEAK_TFLOPS.items() if re.search(rf"(?<!\w){model}(?!\w)", device))
    return next(known, None)


def pretrain_flops(settings: RunSettings, cost: "PassFlops", recompute: bool = False) -> float:
    """A denoising step of the whole network."""
    return (4 if recompute else 3) * cost.forward


def record_flops(settings: RunSettings, cost: "PassFlops", recompute: bool = False) -> float:
    """A sample of the frozen generator and a denoising step on it."""
    return (sampling_passes(settings) + training_passes(settings, cost, recompute)) * cost.forward


def backtrack_flops(settings: RunSettings, cost: "PassFlops", recompute: bool = False) -> float:
    """One fake-score update and its share, 1 / fake_updates, of a generator update."""
    s, gan = settings.backtrack, settings.gan
    adapted, trained = 1 + cost.adapter, training_passes(settings, cost, recompute)
    sample = sampling_passes(settings) * adapted * cost.forward
    target = (1 if s.guidance_scale == 1 else 2) * (adapted if s.path == "walk" else 1) * cost.forward
    generator_update = sample + (trained - adapted) * cost.forward + target + adapted * cost.forward
    fake_update = trained * cost.forward
    if gan.enabled:
        # Generator: from the head back to the sample. Shared, the forward pass is the fake score's on the sample.
        extra_passes = (1 if gan.shared_pass else 2) + recompute
        generator_update += extra_passes * adapted * cost.encoder + 2 * cost.head
        # Fake score: the head on real and on generated samples. Shared, the latter are in the denoising pass.
        fake_update += (1 if gan.shared_pass else 2) * trained * cost.encoder + 2 * 3 * cost.head
    fresh_samples = 0 if s.reuse_x0 else s.fake_updates - 1  # per generator update
    return fake_update + (generator_update + fresh_samples * sample) / s.fake_updates


def sampling_passes(settings: RunSettings) -> float:
    """Average passes per training sample of a generator of n steps: it is drawn at a random one of them, after the ones
    before it."""
    return (len(settings.student_timesteps) + 1) / 2


def training_passes(settings: RunSettings, cost: "PassFlops", recompute: bool) -> float:
    """Forward and backward pass of a trained network, in forward passes of the plain one."""
    forward = 1 + cost.adapter
    backward = forward + cost.adapter if settings.lora.rank else 2.0
    return forward + backward + (forward if recompute else 0)
