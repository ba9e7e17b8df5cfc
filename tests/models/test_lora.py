"""LoRA in place of whole networks: files, strictness, training, resume, ranks, export."""

import json
import shutil

import numpy as np
import peft
import pytest
import support
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from models.errors import ModelError
from models.lora import adapter_parameters, attach, check_targets, load_merged
from models.miniature import build_miniature
from models.pipeline import empty_network, load_network, weights_hash
from models.settings import LoraSettings, MiniatureSettings
from trainer.backtrack import Backtracking, backtrack
from trainer.config.deepspeed import deepspeed_config
from trainer.engine.role import Role, load_trained
from trainer.engine.weights import start_from
from trainer.errors import UserError
from trainer.evaluation.sources import find_source
from trainer.export import export
from trainer.path.manifest import file_hash, open_path
from trainer.record import Recording, record
from trainer.training.run import Run

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def path(lora_path):
    return lora_path


@pytest.fixture
def teacher(root):
    return root / "base" / "pipeline" / "unet"


@pytest.fixture
def output():
    """A function of a network: its prediction on fixed inputs."""
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 4, 4, generator=rng), torch.tensor([10, 700])
    states = torch.randn(2, 16, 16, generator=rng)
    added = {"text_embeds": torch.randn(2, 16, generator=rng), "time_ids": torch.ones(2, 6)}

    def run(net):
        with torch.no_grad():
            return net(x, t, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[0].clone()

    return run


def test_targets_that_are_not_there(root, world, teacher):
    check_targets(teacher, LoraSettings(rank=4))
    with pytest.raises(
        ModelError, match=r"no linear or convolution layer named to_qkv, norm1; it has for example to_q"
    ):
        check_targets(teacher, LoraSettings(rank=4, targets=["to_q", "to_qkv", "norm1"]))
    with pytest.raises(ModelError, match=r"lora.targets is empty"):
        check_targets(teacher, LoraSettings(rank=4, targets=[]))
    run = Run(support.tiny(root, "x", "lora.rank=2", "lora.targets=[attn.qkv]", f"path={root / 'no-path'}"), world)
    for stage in (Recording, Backtracking):
        with pytest.raises(ModelError, match=r"named attn.qkv"):
            stage(run)


def test_a_new_adapter_changes_nothing_and_is_a_function_of_the_seed(teacher, output):
    plain, nets = load_network(teacher), []
    before = output(plain)
    for seed, noise in (("a", 1), ("a", 2), ("b", 1)):
        net = load_network(teacher)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        attach(net, LoraSettings(rank=4, alpha=2), seed)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(output(net), before)
        nets.append(adapter_parameters(net))
    one, two, other = nets
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(*(n["unet.mid_block.resnets.0.conv1.lora_A.weight"] for n in (one, other)))
    a = one["unet.mid_block.resnets.0.conv1.lora_A.weight"]  # Kaiming: uniform within 1 / sqrt(fan in)
    bound = a[0].numel() ** -0.5
    assert 0.9 * bound < float(a.abs().max()) <= bound
    # Every convolution and linear layer of the blocks has one; the first and last layer and the embeddings do not.
    modules = {k.partition(".")[2].partition(".lora_")[0] for k in one}
    layers = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    assert {n.split(".")[0] for n in layers - modules} == {"conv_in", "conv_out", "time_embedding", "add_embedding"}


def test_nodes_are_small_and_load_in_plain_diffusers(root, path, teacher, output):
    manifest = json.loads((path / "path.json").read_text())
    assert manifest["kind"] == "lora" and manifest["lora"]["rank"] == 4 and manifest["lora"]["alpha"] == 2.0
    assert len(manifest["nodes"]) == 4 and manifest["nodes"][0]["bytes"] == 0
    full = json.loads((root / "base" / "path" / "path.json").read_text())
    assert full["kind"] == "full" and full.keys() <= manifest.keys()
    before = output(load_network(teacher))
    for node in manifest["nodes"][1:]:
        folder = path / f"node-{node['index']:04d}"
        assert node["sha256"] == file_hash(path / node["file"])
        assert node["bytes"] < full["nodes"][1]["bytes"] / 3
        assert peft.LoraConfig.from_pretrained(folder).lora_alpha == 2
        unet = UNet2DConditionModel.from_pretrained(teacher)
        unet.load_lora_adapter(folder, prefix="unet", use_safetensors=True)
        merged = output(load_merged(teacher, folder, torch.float32))
        assert torch.allclose(output(unet), merged, atol=1e-5)
        assert not torch.allclose(before, merged, atol=1e-4)


@pytest.mark.parametrize("config", ["zero0", "teacher", "sharded"])
def test_nodes_into_the_targets_adapter(world, path, teacher, output, tmp_path, config):
    """A node is what diffusers makes of it; node 0 is the teacher to the bit, before and after."""
    name = support.sharded_zero3(tmp_path) if config == "sharded" else config
    settings = deepspeed_config(name, 2, 1, 0.0, "fp32", world.size)
    pure = output(Role("teacher", empty_network(teacher), settings, world, folder=teacher))
    network = empty_network(teacher)
    attach(network, LoraSettings(rank=4, alpha=2), "s", world.device, torch.float32)
    role = Role("teacher", network, settings, world, folder=teacher)
    assert torch.equal(output(role), pure)
    role.weights.write(role.weights.read(path / "node-0002"))
    assert torch.allclose(output(role), output(load_merged(teacher, path / "node-0002", torch.float32)), atol=1e-5)
    role.weights.write([torch.zeros_like(w) for w in role.local()])
    assert torch.equal(output(role), pure)


@pytest.mark.parametrize("ablation", ["walk", "warm", "none"])
def test_what_each_role_starts_from_and_trains(root, world, path, teacher, ablation):
    run = Run(support.tiny(root, f"lora-start-{ablation}", *support.lora(root), f"backtrack.path={ablation}"), world)
    stage = Backtracking(run)
    stage.begin(0)
    nodes = {"fake_score": path / "node-0003", "teacher": path / "node-0002"}
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
    assert len(stage.ema.shadow) == len(trained)
    stage.close()


def test_training_leaves_the_base_alone_and_resumes_exactly(root, world, path, teacher):
    """Stopped twice is never stopped, also if it goes on at sharded ZeRO 3; checkpoints hold no base."""
    flags = [*support.lora(root), *support.zero("zero1"), "backtrack.fake_updates=2", "backtrack.reuse_x0=true"]
    whole = support.backtrack_weights(support.single(root, "lora-whole", world, *flags))
    run = support.single(root, "lora-parts", world, *flags)
    assert support.backtrack_weights(run, signal_at=(2,)) is None
    assert support.backtrack_weights(run, signal_at=(5,)) is None
    shutil.copytree(run.folder, root / "lora-elastic")
    assert support.largest_difference(whole, support.backtrack_weights(run)) == 0.0
    assert support.metrics(root / "lora-whole" / "backtrack") == support.metrics(run.folder / "backtrack")
    stage = support.sharded_zero3(root / "lora-elastic")
    elastic = support.backtrack_weights(support.single(root, "lora-elastic", world, *flags, *support.zero(stage)))
    assert support.largest_difference(whole, elastic) < 1e-6
    other = support.single(root, "lora-parts", world, *flags, "lora.alpha=3")
    with pytest.raises(UserError, match=r"lora.alpha was 2.0, is now 3.0"):  # of the path; a checkpoint says the same
        support.backtrack_weights(other)
    last = run.folder / "backtrack" / "checkpoints" / "step-00000008"
    file = last / "engines" / "generator" / "mp_rank_00_model_states.pt"
    saved = torch.load(file, map_location="cpu", weights_only=False)["module"]
    assert len(saved) == 158 and all(".lora_" in key for key in saved)
    stage = Backtracking(support.single(root, "lora-base-weights", world, *support.lora(root)))
    for batch in range(2):
        stage.begin(batch)
        stage.update(0, _Ignore(), 1)
    base = load_network(teacher).state_dict()
    for role in stage.roles.values():
        live = {k.replace(".base_layer.", "."): v for k, v in role.module.state_dict().items() if ".lora_" not in k}
        assert live.keys() == base.keys() and all(torch.equal(live[k], v) for k, v in base.items())
        assert role.state_dict().keys() == adapter_parameters(role.module).keys() if role.adapter else True
    assert any(p.any() for k, p in adapter_parameters(stage.generator.module).items() if ".lora_B." in k)
    stage.close()


class _Ignore:
    def add(self, name, value):
        pass


def test_paths_of_another_kind_are_refused(root, world, path):
    def opened(where, *flags):
        run = Run(support.tiny(root, "x", *flags), world)
        hashes = weights_hash(run.teacher_folder), weights_hash(run.start_folder)
        return open_path(where, run.teacher_folder, hashes, run.settings.student_timesteps, world, run.settings.lora)

    assert len(opened(path, *support.LORA).nodes) == 4
    with pytest.raises(UserError, match=r"its nodes are whole networks, this run trains lora.rank=4.*record a path"):
        opened(root / "base" / "path", *support.LORA)
    with pytest.raises(UserError, match=r"its nodes are LoRA of rank 4, this run trains whole networks"):
        opened(path)
    with pytest.raises(UserError, match=r"lora.rank was 4, is now 8; lora.alpha was 2.0, is now 8.0"):
        opened(path, "lora.rank=8")
    with pytest.raises(UserError, match=r"lora.targets was .*, is now \['to_q'\]"):
        opened(path, *support.LORA, "lora.targets=[to_q]")


def test_loads_are_strict(path, teacher, world, tmp_path):
    network = load_network(teacher)
    attach(network, LoraSettings(rank=4, alpha=2), "s")
    live = {k: v.clone() for k, v in adapter_parameters(network).items()}
    state, key = load_file(path / "node-0001" / FILE), "unet.mid_block.resnets.0.conv1.lora_B.weight"
    changes = {
        "missing": {key: None},
        "unexpected": {key + "x": torch.zeros(1)},
        "shape": {key: torch.zeros(3, 4, 1, 1)},
    }
    for name, change in changes.items():
        folder = tmp_path / name
        shutil.copytree(path / "node-0001", folder)
        save_file({k: v for k, v in (state | change).items() if v is not None}, folder / FILE)
        with pytest.raises(ModelError, match=str(folder)):
            start_from(network, folder, world)
        assert all(torch.equal(v, live[k]) for k, v in adapter_parameters(network).items())
        with pytest.raises(ModelError, match=f"{folder}.*mid_block.resnets.0.conv1"):
            load_merged(teacher, folder, torch.float32)
    note = tmp_path / "base" / "disback.json"
    shutil.copytree(path / "node-0001", note.parent)
    note.write_text(json.dumps({"kind": "lora", "base": "0" * 64}))
    with pytest.raises(ModelError, match="was trained on another network"):
        load_merged(teacher, note.parent, torch.float32)
    for name, p in network.named_parameters():
        p.requires_grad_(".lora_" in name)
    trained = {k: v for k, v in network.state_dict().items() if ".lora_" in k}
    load_trained(trained, network)
    first = next(iter(trained))
    with pytest.raises(RuntimeError, match="missing"):
        load_trained({k: v for k, v in trained.items() if k != first}, network)
    with pytest.raises(RuntimeError, match="unexpected"):
        load_trained(trained | {"conv_in.x": trained[first]}, network)


def test_exports_equal_our_sampling(root, world, path):
    """Merged, unmerged in plain diffusers, and a checkpoint: the same images."""
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
    assert np.array_equal(ours, sampled("generator"))
    assert np.array_equal(ours, sampled(str(root / "unmerged")))
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
    flags += [f"path={tmp_path / 'path'}", "backtrack.loop.sample_every=0"]
    with pytest.raises(ModelError, match=r"named proj_in.*; it has for example to_q, to_k, to_v"):
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


@pytest.mark.slow
def test_two_ranks_train_as_one(root, world, path):
    """With the GAN head beside the adapter; at ZeRO 3 also stopped and resumed, where a checkpoint holds neither base."""
    one = support.backtrack_weights(support.single(root, "lora-one", world, *support.lora_gan(root, "zero0")))
    support.ranks("lora", root)
    assert max(float(v.abs().max()) for k, v in one.items() if ".lora_B." in k and k.startswith("generator.")) > 1e-3
    assert any(k.startswith("fake_score.head.") for k in one)
    assert support.largest_difference(one, torch.load(root / "lora" / "sharded.pt")) < 1e-5
