"""Training with LoRA adapters in place of whole networks: starts, targets, resume, export. test_everything has two ranks."""

import shutil

import numpy as np
import pytest
import support
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from safetensors.torch import load_file
from support import ROUNDING, prediction

from models.errors import ModelError
from models.lora import adapter_parameters, add_adapter, load_merged
from models.miniature import build_miniature
from models.pipeline import empty_network, load_network, weights_hash
from models.settings import LoraSettings, MiniatureSettings
from trainer.backtrack import Backtracking, backtrack
from trainer.config.deepspeed import deepspeed_config
from trainer.engine.role import Role
from trainer.errors import UserError
from trainer.evaluation.sources import find_source
from trainer.export import export
from trainer.path.manifest import open_path
from trainer.record import Recording, record
from trainer.training.run import Run

FILE = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("config", ["zero0", "teacher", "sharded"])
def test_nodes_into_the_targets_adapter(world, lora_path, teacher, tmp_path, config):
    """A node in the target's adapter computes what diffusers makes of it; node 0 is the teacher, and again the same bits
    after another node."""
    name = support.sharded_zero3(tmp_path) if config == "sharded" else config
    settings = deepspeed_config(name, 2, 1, 0.0, "fp32", world.size)
    teacher_alone = prediction(Role("teacher", empty_network(teacher), settings, world, folder=teacher))
    network = empty_network(teacher)
    add_adapter(network, LoraSettings(rank=4, alpha=2), "s", world.device, torch.float32)
    role = Role("teacher", network, settings, world, folder=teacher)
    node_0 = prediction(role)
    torch.testing.assert_close(node_0, teacher_alone, **ROUNDING)
    role.weights.write(role.weights.read(lora_path / "node-0002"))
    merged = prediction(load_merged(teacher, lora_path / "node-0002", torch.float32))
    torch.testing.assert_close(prediction(role), merged, **ROUNDING)
    role.weights.write([torch.zeros_like(w) for w in role.local()])
    assert torch.equal(prediction(role), node_0)


@pytest.mark.parametrize("ablation", ["walk", "warm", "none"])
def test_what_each_role_starts_from_and_trains(root, world, lora_path, ablation):
    run = Run(support.tiny(root, f"lora-start-{ablation}", *support.lora(root), f"backtrack.path={ablation}"), world)
    stage = Backtracking(run)
    stage.begin(0)
    nodes = {"fake_score": lora_path / "node-0003", "teacher": lora_path / "node-0002"}
    if ablation != "walk":
        del nodes["teacher"]
        assert not stage.teacher.adapter  # a target that never moves costs nothing more
    if ablation == "none":
        nodes = {}
    for name, folder in nodes.items():
        live = adapter_parameters(stage.roles[name].module)
        assert all(torch.equal(live[k], v.float()) for k, v in load_file(folder / FILE).items()), name
    new = {"generator"} if nodes else {"generator", "fake_score"}
    for name in new:
        assert not any(p.any() for k, p in adapter_parameters(stage.roles[name].module).items() if ".lora_B." in k)
    if ablation == "walk":
        stage.target.move(1000)
        assert stage.target.node == 0 and not any(w.any() for w in stage.teacher.local())
    for role in (stage.generator, stage.fake_score):
        trained = {id(p) for p in adapter_parameters(role.module).values()}
        assert {id(p) for g in role.adam.param_groups for p in g["params"]} == trained
        assert {id(p) for p in role.module.parameters() if p.requires_grad} == trained
    assert len(stage.average.ema.shadow) == len(trained)
    stage.close()


class BaseWeights(support.Interrupted):
    """Backtracking that compares the weights below its adapters with the teacher's when it ends."""

    def close(self):
        teacher = load_network(self.run.teacher_folder).state_dict()
        for role in self.roles.values():
            live = {k.replace(".base_layer.", "."): v for k, v in role.module.state_dict().items() if ".lora_" not in k}
            assert live.keys() == teacher.keys() and all(torch.equal(live[k], v) for k, v in teacher.items())
            assert role.state_dict().keys() == adapter_parameters(role.module).keys() if role.adapter else True
        assert any(p.any() for k, p in adapter_parameters(self.generator.module).items() if ".lora_B." in k)
        super().close()


def test_training_leaves_the_base_alone_and_resumes_exactly(root, world, lora_path):
    """Stopped twice is never stopped, also if it goes on at sharded ZeRO 3; checkpoints hold no base."""
    flags = [*support.lora(root), *support.zero("zero1"), "backtrack.fake_updates=2", "backtrack.reuse_x0=true"]
    flags += ["backtrack.steps=6"]
    whole = support.backtrack_weights(support.single(root, "lora-whole", world, *flags), BaseWeights)
    run = support.single(root, "lora-parts", world, *flags)
    assert support.backtrack_weights(run, signal_at=(2,)) is None
    assert support.backtrack_weights(run, signal_at=(4,)) is None
    shutil.copytree(run.folder, root / "lora-elastic")
    assert support.largest_difference(whole, support.backtrack_weights(run)) == 0.0
    assert support.metrics(root / "lora-whole" / "backtrack") == support.metrics(run.folder / "backtrack")
    stage = support.sharded_zero3(root / "lora-elastic")
    elastic = support.backtrack_weights(support.single(root, "lora-elastic", world, *flags, *support.zero(stage)))
    assert support.largest_difference(whole, elastic) < 1e-6
    other = support.single(root, "lora-parts", world, *flags, "lora.alpha=3")
    with pytest.raises(UserError, match=r"lora.alpha was 2.0, is now 3.0"):  # of the path; a checkpoint says the same
        support.backtrack_weights(other)
    last = run.folder / "backtrack" / "checkpoints" / "step-00000006"
    file = last / "engines" / "generator" / "mp_rank_00_model_states.pt"
    saved = torch.load(file, map_location="cpu", weights_only=False)["module"]
    assert len(saved) == 158 and all(".lora_" in key for key in saved)


def test_paths_of_another_kind_are_refused(root, world, lora_path):
    def opened(where, *flags):
        run = Run(support.tiny(root, "x", *flags), world)
        hashes = weights_hash(run.teacher_folder), weights_hash(run.start_folder)
        return open_path(where, run.teacher_folder, hashes, run.settings.student_timesteps, world, run.settings.lora)

    assert len(opened(lora_path, *support.LORA).nodes) == 4
    with pytest.raises(UserError, match=r"its nodes are whole networks, this run trains lora.rank=4.*record a path"):
        opened(root / "base" / "path", *support.LORA)
    with pytest.raises(UserError, match=r"its nodes are LoRA of rank 4, this run trains whole networks"):
        opened(lora_path)
    with pytest.raises(UserError, match=r"lora.rank was 4, is now 8; lora.alpha was 2.0, is now 8.0"):
        opened(lora_path, "lora.rank=8")
    with pytest.raises(UserError, match=r"lora.targets was .*, is now \['to_q'\]"):
        opened(lora_path, *support.LORA, "lora.targets=[to_q]")


def test_exports_equal_our_sampling(root, world, lora_path):
    """Merged, unmerged in plain diffusers, and a checkpoint: the same images, but for the rounding of a byte."""
    flags = [*support.lora(root), f"export.out={root / 'unmerged'}", "backtrack.generator.lr=3e-2"]
    run = Run(support.tiny(root, "lora-export", *flags), world)
    backtrack(run)
    export(
        Run(run.settings.model_copy(update={"export": run.settings.export.model_copy(update={"merge": False})}), world)
    )
    prompts = ["a handwritten seven", "the digit two, written by hand", "a small drawing of a nine"]

    def sampled(what):
        images = find_source(run, what).open(run).images(prompts, 5, [0, 1, 2])
        return images.permute(0, 2, 3, 1).numpy().astype(np.float32) / 255

    def piped(folder, lora=None):
        pipe = DiffusionPipeline.from_pretrained(folder)
        if lora:
            pipe.load_lora_weights(lora)
        pipe.set_progress_bar_config(disable=True)
        noise = [torch.Generator("cpu").manual_seed(5 + i) for i in range(3)]
        return pipe(prompts, num_inference_steps=1, guidance_scale=0.0, generator=noise, output_type="np").images

    ours, start = sampled("step-00000008"), sampled("start")
    assert np.abs(ours - start).max() > 3 / 255  # it trained
    for what in ("generator", str(root / "unmerged")):
        assert np.abs(ours - sampled(what)).max() <= 1.01 / 255
    merged = piped(run.folder / "generator")
    beside = piped(root / "unmerged", str(root / "unmerged" / "lora"))
    for theirs in (merged, beside):
        assert np.abs(theirs - ours).max() <= 1.01 / 255  # ours truncates to bytes
    assert np.abs(merged - beside).max() < 1e-4
    assert np.abs(piped(root / "unmerged") - start).max() <= 1.01 / 255  # without its LoRA it is the start


def test_a_transformer(shards, world, tmp_path):
    """Stable Diffusion 3 through both stages at sharded ZeRO 3; a node and the export load in diffusers."""
    sizes = {"unet_channels": (16, 32), "vae_channels": (16, 16), "text_widths": (8, 8), "pooled": 16}
    build_miniature(MiniatureSettings(family="sd3", **sizes)).save_pretrained(tmp_path / "sd3")
    stage = support.sharded_zero3(tmp_path)
    flags = ["record.steps=2", "record.nodes=2", "backtrack.steps=4", "conditioning_timestep=1000", *support.LORA]
    flags += [*support.zero(stage), f"record.ds_config={stage}", f"pipeline={tmp_path / 'sd3'}"]
    flags += [f"path={tmp_path / 'path'}"]
    with pytest.raises(ModelError, match=r"named proj_in.*; it has, for example, to_q, to_k, to_v"):
        Recording(Run(support.tiny(shards, "lora-sd3", *flags), world))
    run = Run(support.tiny(shards, "lora-sd3", *flags, "lora.targets=[to_q, to_k, to_v, to_out.0]"), world)
    record(run)
    backtrack(run)
    start = load_network(run.teacher_folder)
    merged = load_merged(run.teacher_folder, tmp_path / "path" / "node-0002", torch.float32)
    adapted = load_network(run.teacher_folder)
    adapted.load_lora_adapter(tmp_path / "path" / "node-0002", prefix="transformer", use_safetensors=True)
    x, t = torch.randn(1, *run.sampler(tmp_path / "sd3").latent_shape), torch.tensor([500])
    text = {"encoder_hidden_states": torch.randn(1, 5, start.config.joint_attention_dim)}
    text["pooled_projections"] = torch.randn(1, start.config.pooled_projection_dim)
    with torch.no_grad():
        plain, ours, theirs = (net(x, timestep=t, **text)[0] for net in (start, merged, adapted))
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, plain, atol=1e-4)
    final = SD3Transformer2DModel.from_pretrained(run.folder / "generator" / "transformer").state_dict()
    assert {k for k, v in start.state_dict().items() if not torch.equal(v, final[k])} == {
        f"{n}.weight" for n, m in start.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
