"""Every model family through both stages, and out as a plain diffusers pipeline."""

import warnings

import pytest
import support
import torch
from safetensors.torch import load_file

from models.denoise import generate
from models.families import family_of
from models.multistep import Student
from models.pipeline import load_network
from models.sampler import ImageNoise
from trainer.backtrack import backtrack
from trainer.evaluation.sources import find_source
from trainer.pretrain import pretrain
from trainer.record import record
from trainer.training.run import Run

CPU = torch.device("cpu")
PROMPTS = support.PROMPTS[:2]


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sd3"])
def test_both_stages(shards, world, pipelines, tmp_path, kind):
    """Recorded and distilled through the real stages; nodes load in diffusers; the export makes our generator's x0."""
    pipeline, timestep = pipelines[kind], 1000 if kind == "sd3" else 399
    settings = ["record.steps=2", "record.nodes=2", "backtrack.steps=4", "timestep_shift=3"]
    settings += [f"pipeline={pipeline}", f"path={shards / f'path-{kind}'}", f"conditioning_timestep={timestep}"]
    if kind == "sd3":  # its network has a buffer that is saved, and nothing like a UNet's blocks: shard every parameter
        stage = support.sharded_zero3(tmp_path)
        settings += [*support.zero(stage), f"record.ds_config={stage}", f"record.teacher_ds_config={stage}"]
    run = Run(support.tiny(shards, f"family-{kind}", *settings), world)
    record(run)
    backtrack(run)
    family = family_of(pipeline)
    teacher = load_network(run.teacher_folder).state_dict()
    for node in (1, 2):
        network = family.network.from_pretrained(run.settings.path_folder / f"node-{node:04d}")
        state = network.state_dict()
        assert state.keys() == teacher.keys() and all(v.isfinite().all() for v in state.values())
        assert any(not torch.allclose(v, teacher[k], rtol=0.01) for k, v in state.items())
    lines = support.metrics(run.folder / "backtrack")
    assert {line["target_node"] for line in lines} == {0, 1}
    assert all(line["loss/fake_score"] == line["loss/fake_score"] for line in lines if "loss/fake_score" in line)
    folder = run.folder / "generator"
    assert any(not torch.equal(v, teacher[k]) for k, v in load_network(folder / family.part).state_dict().items())
    theirs = support.plain(folder)(
        PROMPTS, num_inference_steps=1, guidance_scale=0.0, generator=support.generators(2), output_type="latent"
    ).images
    sampler = run.sampler(pipeline)
    z = ImageNoise(5, [0, 1], sampler.latent_shape, CPU).draw()
    cond = sampler.text.encode(PROMPTS, sampler.size)
    with torch.no_grad():
        ours = generate(load_network(folder / family.part).eval(), z, cond, sampler.schedule, timestep)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, **support.ROUNDING)
    images = find_source(run, "generator").open(run).images(PROMPTS, 5, [0, 1])
    # Two programs: the last bit of a latent may cut a byte off either way.
    assert (images.int() - sampler.decode(ours).int()).abs().max() <= 1


def test_gan_and_several_steps_without_pooled_text(shards, world, pipelines, tmp_path):
    """Stable Diffusion 1 with a head, two steps and samples that are used again, stopped and resumed; the export steps as
    the student does."""
    settings = ["backtrack.path=none", "backtrack.reuse_x0=true", "backtrack.student_timesteps=[999,499]"]
    settings += ["gan.enabled=true", f"pipeline={pipelines['sd15']}", "backtrack.fake_updates=2"]
    for steps in (2, 4):
        run = Run(support.tiny(shards, "sd-gan", *settings, f"backtrack.steps={steps}"), world)
        backtrack(run)
    folder, timesteps = run.folder / "generator", (999, 499)
    line = next(m for m in support.metrics(run.folder / "backtrack") if "loss/gan_head" in m)
    assert line["loss/gan_head"] > 0 and line["loss/gan_generator"] > 0
    pipe = support.plain(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = pipe(
            PROMPTS[:1],
            num_inference_steps=2,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(5),
            output_type="latent",
        ).images
    sampler = run.sampler(pipelines["sd15"])
    noise = ImageNoise(5, [0], sampler.latent_shape, CPU)
    cond = sampler.text.encode(PROMPTS[:1], (8, 8))
    with torch.no_grad():
        student = Student(sampler.schedule, timesteps)
        ours = student.trajectory(load_network(folder / "unet").eval(), cond, lambda _: noise.draw(), 2)[-1]
    assert theirs.std() > 0.1 and torch.allclose(ours, theirs, atol=1e-4)


def test_pretraining_a_flow_model_with_shifted_latents(shards, world):
    """The miniature's own family, through the autoencoder and the teacher; SD3's autoencoder has a shift."""
    sizes = ["pretrain.steps=2", "pretrain.autoencoder.steps=2", "pretrain.miniature.family=sd3"]
    run = Run(support.tiny(shards, "flow", *sizes, f"pipeline={shards / 'flow' / 'pipeline'}"), world)
    pretrain(run)
    out, start = run.folder / "pipeline", run.folder / "pretrain" / "start"
    old, new = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (start, out))
    assert old.keys() == new.keys() and any(not torch.equal(old[k], new[k]) for k in old)
    assert torch.allclose(old["pos_embed.pos_embed"], new["pos_embed.pos_embed"])
    sampler = run.sampler(out)
    vae = sampler.vae.config
    assert vae.shift_factor == 0.0609 and vae.scaling_factor != 0.18215
    latents = torch.randn(2, *sampler.latent_shape)
    assert torch.allclose(sampler.scale(latents), (latents - 0.0609) * vae.scaling_factor)
    decoded = sampler.vae.decode(latents).sample
    bytes_ = ((decoded + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert (sampler.decode(sampler.scale(latents)).int() - bytes_.int()).abs().max() <= 1  # scaling back rounds
