"""Students of several steps: their training input, their path, and the exported pipeline in plain diffusers."""

import json

import numpy as np
import pytest
import support
import torch
from diffusers import DiffusionPipeline
from torch import nn

from models.conditioning import Conditioning
from models.diffusion import Schedule
from models.errors import ModelError
from models.generator_pipeline import write_generator_pipeline
from models.multistep import Student
from models.noise import SampleNoise
from models.pipeline import load_network
from models.sampler import ImageNoise
from trainer.backtrack import backtrack
from trainer.errors import UserError
from trainer.evaluation.sources import find_source
from trainer.record import record
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
        assert torch.equal(x0, chain[k])
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
    assert all(torch.equal(whole[i], chain[i % 4][i]) for i in range(6))
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
    prompts = ["a handwritten seven", "the digit two, written by hand", "a small drawing of a nine"]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "p")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(5 + i) for i in range(3)]
    theirs = pipe(prompts, **call, guidance_scale=0.0, generator=generators, output_type="latent").images
    sampler = run.sampler(source)
    noise = ImageNoise(5, [0, 1, 2], sampler.latent_shape, world.device)
    student = Student(sampler.schedule, timesteps)
    with torch.no_grad():
        text = sampler.text.encode(prompts, sampler.resolution)
        ours = student.trajectory(load_network(source / "unet").eval(), text, lambda _: noise.draw(), len(timesteps))[
            -1
        ]
    assert theirs.std() > 0.1 and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


def test_a_student_from_recording_to_pipeline(root, world):
    """Its path is its own; a run with other steps refuses it; the pipeline, the checkpoint and our sampler agree."""
    path = root / "student-run" / "own"
    flags = (f"path={path}", "backtrack.student_timesteps=[999, 499]", "backtrack.steps=4", "gan.enabled=true")
    run = Run(support.tiny(root, "student-run", *flags), world)
    record(run)
    assert json.loads((path / "path.json").read_text())["timesteps"] == [999, 499]
    with pytest.raises(UserError, match=r"another generator start \(timestep 999,499, this run 399;"):
        backtrack(Run(support.tiny(root, "other", f"path={path}"), world))
    backtrack(run)
    folder, prompts = run.folder / "generator", ["a handwritten seven", "a small drawing of a nine"]
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(i) for i in range(2)]
    theirs = pipe(prompts, num_inference_steps=2, guidance_scale=0.0, generator=generators, output_type="np").images
    for what in (str(folder), "step-00000004"):
        ours = find_source(run, what).open(run).images(prompts, 0, [0, 1]).permute(0, 2, 3, 1).numpy() / 255
        assert np.abs(theirs - ours).max() <= 1.01 / 255  # ours truncates to bytes


def test_a_generator_turn_in_pieces_is_the_same(root, world):
    flags = (*support.PARITY, "backtrack.steps=4", *support.zero("zero1"))
    whole = support.backtrack_weights(support.single(root, "whole-turn", world, *flags))
    pieces = support.backtrack_weights(support.single(root, "pieces", world, *flags, "backtrack.generator_split=4"))
    assert support.largest_difference(whole, pieces) < 1e-6
    lines = [support.metrics(root / name / "backtrack")[-1] for name in ("whole-turn", "pieces")]
    for key in ("grad_norm/generator", "mismatch", "loss/fake_score"):
        assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-4)
    with pytest.raises(UserError, match=r"generator_split=3 does not divide the micro-batch of 4 .*use one of 1, 2, 4"):
        support.backtrack_weights(support.single(root, "thirds", world, *flags, "backtrack.generator_split=3"))
