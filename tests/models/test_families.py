"""Every model family: sampled as diffusers samples it, its FLOP, its plan. test_family_runs trains them."""

import json
import shutil

import pytest
import support
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.denoise import predict
from models.errors import ModelError
from models.families import FAMILIES, family_of
from models.pipeline import load_network
from models.profile import pass_flops
from models.sampler import ImageNoise, Sampler
from trainer.backtrack import backtrack
from trainer.planner.summary import Cluster, make_plan
from trainer.training.run import Run

CPU = torch.device("cpu")
PROMPTS = support.PROMPTS[:2]


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
    sampler = Sampler.load(folder, (8, 8), torch.float32, CPU)
    network = load_network(folder / family_of(folder).part).eval()
    z = ImageNoise(5, [0, 1], sampler.latent_shape, CPU).draw()
    ours = sampler.diffusion_images(network, PROMPTS, z, 4, 5.0).permute(0, 2, 3, 1)
    pipe = support.plain(folder, **parts)
    theirs = pipe(
        PROMPTS, num_inference_steps=4, guidance_scale=5.0, generator=support.generators(2), output_type="pt"
    ).images
    assert theirs.std() > 0.01
    assert (ours / 255 - theirs.permute(0, 2, 3, 1)).abs().max() <= 1.01 / 255  # ours truncates to bytes
    empty = sampler.text.encode(PROMPTS, (8, 8)).unconditional().states
    assert bool((empty == 0).all()) == (case == "sdxl")


@pytest.mark.parametrize("kind", support.KINDS)
def test_flops_are_those_of_the_network(pipelines, kind):
    folder = pipelines[kind]
    family = family_of(folder)
    assert family is FAMILIES[support.KINDS[kind]]
    network, sampler = load_network(folder / family.part), Sampler.load(folder, (8, 8), torch.float32, CPU)
    cond = sampler.text.encode(PROMPTS[:1], (8, 8))
    # The counter knows no fused attention of the CPU: take it apart into products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        predict(network, torch.zeros(1, *sampler.latent_shape), torch.tensor([7]), cond)
    counted = pass_flops(dict(network.config), sampler.latent_shape, sampler.text.tokens)
    assert counted.forward == counter.get_total_flops() > 1e5
    assert len(cond.states[0]) == sampler.text.tokens


def test_a_head_on_a_transformer_is_refused(shards, world, pipelines):
    pipeline = f"pipeline={pipelines['sd3']}"
    settings = support.tiny(shards, "sd3-gan", "gan.enabled=true", pipeline, "conditioning_timestep=1000")
    with pytest.raises(ModelError, match="SD3Transformer2DModel has no mid_block .* set gan.enabled=false"):
        backtrack(Run(settings, world))
    with pytest.raises(ModelError, match="SD3Transformer2DModel has no mid_block"):
        make_plan(settings, Cluster(gpus_per_node=1))


@pytest.mark.parametrize("kind", support.KINDS)
def test_plan_counts_every_family(shards, pipelines, kind):
    folder = pipelines[kind]
    pipe, part = support.plain(folder), family_of(folder).part
    options = ["lora.targets=[to_q]", "conditioning_timestep=1000"] if kind == "sd3" else []
    settings = support.tiny(shards, "planned", f"pipeline={folder}", "lora.rank=2", *options)
    plan = make_plan(settings, Cluster(gpus_per_node=1))
    encoders = [p for name, p in pipe.components.items() if name.startswith("text_encoder") and p is not None]
    assert plan["parameters"]["text_encoders"] == sum(e.num_parameters() for e in encoders)
    network = getattr(pipe, part)
    assert (
        plan["parameters"]["generator"]["frozen"] == plan["parameters"]["teacher"]["frozen"] == network.num_parameters()
    )
    sampler = Sampler.load(folder, (8, 8), torch.float32, CPU)
    config = {**network.config, "_class_name": type(network).__name__}
    flops = pass_flops(config, sampler.latent_shape, sampler.text.tokens).forward
    assert plan["per_sample"]["forward_tflop"] == pytest.approx(flops / 1e12)
    assert plan["fits"]
