"""Every family through both stages, out as a plain diffusers pipeline, and sampled as diffusers samples it."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import support
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.denoise import generate, predict
from models.errors import ModelError
from models.families import FAMILIES, family_of
from models.miniature import build_miniature
from models.multistep import Student
from models.pipeline import load_network
from models.profile import pass_flops
from models.sampler import ImageNoise, Sampler
from models.settings import MiniatureSettings
from trainer.backtrack import backtrack
from trainer.evaluation.sources import find_source
from trainer.planner.summary import Cluster, make_plan
from trainer.pretrain import pretrain
from trainer.record import record
from trainer.training.run import Run

KINDS = {"sdxl": "sdxl", "sd15": "sd", "sd21": "sd", "sd3": "sd3"}  # miniature: family
PROMPTS = ["a handwritten seven", "the digit two, written by hand"]
CPU = torch.device("cpu")


def miniature(kind: str, folder: Path, **changes: object) -> Path:
    sizes = {"unet_channels": (16, 32), "vae_channels": (16, 16), "text_widths": (8, 8), "pooled": 16}
    build_miniature(MiniatureSettings(family=kind, **sizes | changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: miniature(kind, root / kind) for kind in KINDS}


def plain(folder: Path, **parts: object) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators() -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(5 + i) for i in range(len(PROMPTS))]


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
    theirs = plain(folder)(
        PROMPTS, num_inference_steps=1, guidance_scale=0.0, generator=generators(), output_type="latent"
    ).images
    sampler = run.sampler(pipeline)
    z = ImageNoise(5, [0, 1], sampler.latent_shape, CPU).draw()
    cond = sampler.text.encode(PROMPTS, sampler.resolution)
    with torch.no_grad():
        ours = generate(load_network(folder / family.part).eval(), z, cond, sampler.schedule, timestep)
    assert theirs.std() > 0.1 and torch.allclose(ours, theirs, atol=1e-5)
    images = find_source(run, "generator").open(run).images(PROMPTS, 5, [0, 1])
    assert torch.equal(images, sampler.decode(ours))


CASES = ["sdxl", "sdxl encodes the empty caption", "sd15", "sd21", "sd3", "sd3 without t5"]


@pytest.mark.parametrize("case", CASES)
def test_teacher_samples_as_in_diffusers(pipelines, tmp_path, case):
    """Many guided steps: the scheduler's steps, the call of the network, and what each family's empty caption is."""
    kind, folder, parts = case.split()[0], pipelines[case.split()[0]], {}
    if len(case.split()) > 1:
        folder = shutil.copytree(folder, tmp_path / "p")
        file = folder / "model_index.json"
        index = json.loads(file.read_text())
        if kind == "sdxl":
            index["force_zeros_for_empty_prompt"] = False
        else:
            parts = {"text_encoder_3": None, "tokenizer_3": None}
            index |= {key: [None, None] for key in parts}
        file.write_text(json.dumps(index))
    sampler = Sampler.load(folder, 8, torch.float32, CPU)
    network = load_network(folder / family_of(folder).part).eval()
    z = ImageNoise(5, [0, 1], sampler.latent_shape, CPU).draw()
    ours = sampler.diffusion_images(network, PROMPTS, z, 4, 5.0).permute(0, 2, 3, 1)
    pipe = plain(folder, **parts)
    theirs = pipe(PROMPTS, num_inference_steps=4, guidance_scale=5.0, generator=generators(), output_type="pt").images
    assert theirs.std() > 0.01
    assert (ours / 255 - theirs.permute(0, 2, 3, 1)).abs().max() <= 1.01 / 255  # ours truncates to bytes
    empty = sampler.text.encode(PROMPTS, 8).unconditional().states
    assert bool((empty == 0).all()) == (case == "sdxl")


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_network(pipelines, kind):
    folder = pipelines[kind]
    family = family_of(folder)
    assert family is FAMILIES[KINDS[kind]]
    network, sampler = load_network(folder / family.part), Sampler.load(folder, 8, torch.float32, CPU)
    cond = sampler.text.encode(PROMPTS[:1], 8)
    # The counter knows no fused attention of the CPU: take it apart into products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        predict(network, torch.zeros(1, *sampler.latent_shape), torch.tensor([7]), cond)
    counted = pass_flops(dict(network.config), sampler.latent_shape, sampler.text.tokens)
    assert counted.forward == counter.get_total_flops() > 1e5
    assert len(cond.states[0]) == sampler.text.tokens


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
    pipe = plain(folder)
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
    cond = sampler.text.encode(PROMPTS[:1], 8)
    with torch.no_grad():
        student = Student(sampler.schedule, timesteps)
        ours = student.trajectory(load_network(folder / "unet").eval(), cond, lambda _: noise.draw(), 2)[-1]
    assert theirs.std() > 0.1 and torch.allclose(ours, theirs, atol=1e-4)


def test_a_head_on_a_transformer_is_refused(shards, world, pipelines):
    pipeline = f"pipeline={pipelines['sd3']}"
    settings = support.tiny(shards, "sd3-gan", "gan.enabled=true", pipeline, "conditioning_timestep=1000")
    with pytest.raises(ModelError, match="SD3Transformer2DModel has no mid_block .* set gan.enabled=false"):
        backtrack(Run(settings, world))
    with pytest.raises(ModelError, match="SD3Transformer2DModel has no mid_block"):
        make_plan(settings, Cluster(gpus_per_node=1))


@pytest.mark.parametrize("kind", KINDS)
def test_plan_counts_every_family(shards, pipelines, kind):
    folder = pipelines[kind]
    pipe, part = plain(folder), family_of(folder).part
    settings = support.tiny(shards, "planned", f"pipeline={folder}", "lora.rank=2")
    plan = make_plan(settings, Cluster(gpus_per_node=1))
    encoders = [p for name, p in pipe.components.items() if name.startswith("text_encoder") and p is not None]
    assert plan["parameters"]["text_encoders"] == sum(e.num_parameters() for e in encoders)
    network = getattr(pipe, part)
    assert (
        plan["parameters"]["generator"]["frozen"] == plan["parameters"]["teacher"]["frozen"] == network.num_parameters()
    )
    sampler = Sampler.load(folder, 8, torch.float32, CPU)
    config = {**network.config, "_class_name": type(network).__name__}
    flops = pass_flops(config, sampler.latent_shape, sampler.text.tokens).forward
    assert plan["per_sample"]["forward_tflop"] == pytest.approx(flops / 1e12)
    assert plan["fits"]


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
    assert torch.equal(sampler.decode(sampler.scale(latents)), ((decoded + 1) * 127.5).clamp(0, 255).to(torch.uint8))
