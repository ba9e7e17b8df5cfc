"""Students of several steps: their training input, their path, and the exported pipeline in plain diffusers."""

import json

import numpy as np
import pytest
import support
import torch
from torch import nn

from models.conditioning import Conditioning
from models.diffusion import Schedule
from models.errors import ModelError
from models.generator_pipeline import write_generator_pipeline
from models.multistep import Student
from models.noise import SampleNoise
from models.pipeline import load_network
from models.sampler import ImageNoise
from trainer.errors import UserError
from trainer.training.run import Run

FOUR, UNEVEN = (999, 749, 499, 249), (999, 600, 100)
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


class Recorder(nn.Module):
    """A denoiser with one weight that notes the timestep of each call and whether it had a gradient."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.tensor(0.3)), []

    def forward(self, x, t, **inputs):
        self.calls.append((int(t[0]), torch.is_grad_enabled()))
        return (self.weight * x.tanh(),)


def cond(batch):
    return Conditioning(torch.zeros(batch, 3, 4), torch.zeros(batch, 4), torch.zeros(batch, 6))


def test_backward_simulation_is_the_samplers_own_chain():
    """x0 of step k is what sampling has at step k; only the last call has a gradient; k is the same for all samples."""
    student, noise, index = Student(Schedule.from_config(SDXL), FOUR), SampleNoise("s"), [3, 7]
    seen = []
    for step in range(12):
        net = Recorder()
        x0 = student.training_sample(net, cond(2), noise.at(step, index), (4, 2, 2))
        k = len(net.calls) - 1
        assert net.calls == [(t, False) for t in FOUR[:k]] + [(FOUR[k], True)]
        draws = noise.at(step, index)
        chain = student.trajectory(
            net, cond(2), lambda j, draws=draws: draws.normal(f"z{j}" if j else "z", (4, 2, 2)), 4
        )
        assert torch.allclose(x0, chain[k], atol=1e-6)
        alone = student.training_sample(Recorder(), cond(1), noise.at(step, [7]), (4, 2, 2))
        assert torch.allclose(alone[0], x0[1], atol=1e-6)
        seen.append(k)
    assert set(seen) == {0, 1, 2, 3}


def test_steps_of_a_student_are_drawn_evenly():
    noise = SampleNoise("s")
    counts = np.bincount([noise.at(step, []).integer("student step", 4) for step in range(4000)])
    assert len(counts) == 4 and abs(counts - 1000).max() < 120


def test_a_probe_has_every_step():
    student, noise, net = Student(Schedule.from_config(SDXL), FOUR), SampleNoise("s"), Recorder()
    draws = noise.at(0, list(range(6)))
    whole = student.every_step(net, cond(6), draws, "p", (4, 2, 2))
    chain = student.trajectory(net, cond(6), lambda k: draws.normal(f"p{k or ''}", (4, 2, 2)), 4)
    assert all(torch.allclose(whole[i], chain[i % 4][i], atol=1e-6) for i in range(6))
    part = student.every_step(net, cond(2), noise.at(0, [4, 5]), "p", (4, 2, 2))
    assert torch.allclose(part, whole[4:], atol=1e-6)


def test_timesteps_are_checked():
    with pytest.raises(UserError, match="student_timesteps.*must fall"):
        support.load_settings(support.TINY, ["backtrack.student_timesteps=[249, 499]"])
    with pytest.raises(ModelError, match="schedule ends at 999"):
        Student(Schedule.from_config(SDXL), (1000,))


@pytest.mark.parametrize(
    ("timesteps", "call"), [(FOUR, {"num_inference_steps": 4}), (UNEVEN, {"timesteps": list(UNEVEN)})]
)
def test_exported_students_equal_our_sampling(root, world, tmp_path, timesteps, call):
    """Latents of a plain diffusers call, given the same generators, to rounding."""
    run = Run(support.tiny(root, "student"), world)
    source = run.pipeline_folder
    said = write_generator_pipeline(source, source / "unet", timesteps, tmp_path / "p", {})
    arguments = ", ".join(f"{k}={v}" for k, v in call.items())
    assert said == f"pipe(prompt, {arguments}, guidance_scale=0.0)"
    assert json.loads((tmp_path / "p" / "disback.json").read_text())["call"] == said
    pipe, noise = support.plain(tmp_path / "p"), support.generators(3)
    theirs = pipe(support.PROMPTS, **call, guidance_scale=0.0, generator=noise, output_type="latent").images
    sampler = run.sampler(source)
    noise = ImageNoise(5, [0, 1, 2], sampler.latent_shape, world.device)
    student = Student(sampler.schedule, timesteps)
    with torch.no_grad():
        text = sampler.text.encode(support.PROMPTS, sampler.size)
        network = load_network(source / "unet").eval()
        ours = student.trajectory(network, text, lambda _: noise.draw(), len(timesteps))[-1]
    assert theirs.std() > 0.1 and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
