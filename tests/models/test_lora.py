"""LoRA adapters: their targets, first values, files and strict loads."""

import json
import shutil

import peft
import pytest
import support
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support import ROUNDING, prediction

from models.errors import ModelError
from models.lora import adapter_parameters, add_adapter, check_targets, load_merged
from models.pipeline import load_network
from models.settings import LoraSettings
from trainer.backtrack import Backtracking
from trainer.engine.role import load_trained
from trainer.engine.weight_slices import load_adapter
from trainer.path.manifest import file_hash
from trainer.record import Recording
from trainer.training.run import Run

FILE = "pytorch_lora_weights.safetensors"


def test_unknown_targets_are_refused(root, world, teacher):
    check_targets(teacher, LoraSettings(rank=4))
    with pytest.raises(
        ModelError, match=r"no linear or convolution layer named to_qkv, norm1; it has, for example, to_q"
    ):
        check_targets(teacher, LoraSettings(rank=4, targets=["to_q", "to_qkv", "norm1"]))
    with pytest.raises(ModelError, match=r"lora.targets is empty"):
        check_targets(teacher, LoraSettings(rank=4, targets=[]))
    run = Run(support.tiny(root, "x", "lora.rank=2", "lora.targets=[attn.qkv]", f"path={root / 'no-path'}"), world)
    for stage in (Recording, Backtracking):
        with pytest.raises(ModelError, match=r"named attn.qkv"):
            stage(run)


def test_a_new_adapter_changes_nothing_and_is_a_function_of_the_seed(teacher):
    """Nothing but rounding: with adapters the network is another program, whose products may be summed in another order."""
    plain, nets = load_network(teacher), []
    before = prediction(plain)
    for seed, noise in (("a", 1), ("a", 2), ("b", 1)):
        net = load_network(teacher)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        add_adapter(net, LoraSettings(rank=4, alpha=2), seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(prediction(net), before, **ROUNDING)
        nets.append(adapter_parameters(net))
        assert not any(p.any() for key, p in nets[-1].items() if ".lora_B." in key)
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


def test_nodes_are_small_and_load_in_plain_diffusers(root, lora_path, teacher):
    manifest = json.loads((lora_path / "path.json").read_text())
    assert manifest["kind"] == "lora" and manifest["lora"]["rank"] == 4 and manifest["lora"]["alpha"] == 2.0
    assert len(manifest["nodes"]) == 4 and manifest["nodes"][0]["bytes"] == 0
    full = json.loads((root / "base" / "path" / "path.json").read_text())
    assert full["kind"] == "full" and full.keys() <= manifest.keys()
    before = prediction(load_network(teacher))
    for node in manifest["nodes"][1:]:
        folder = lora_path / f"node-{node['index']:04d}"
        assert node["sha256"] == file_hash(lora_path / node["file"])
        assert node["bytes"] < full["nodes"][1]["bytes"] / 3
        assert peft.LoraConfig.from_pretrained(folder).lora_alpha == 2
        unet = UNet2DConditionModel.from_pretrained(teacher)
        unet.load_lora_adapter(folder, prefix="unet", use_safetensors=True)
        merged = prediction(load_merged(teacher, folder, torch.float32))
        assert torch.allclose(prediction(unet), merged, atol=1e-5)
        assert not torch.allclose(before, merged, atol=1e-4)


def test_loads_are_strict(lora_path, teacher, world, tmp_path):
    network = load_network(teacher)
    add_adapter(network, LoraSettings(rank=4, alpha=2), "s")
    live = {k: v.clone() for k, v in adapter_parameters(network).items()}
    state, key = load_file(lora_path / "node-0001" / FILE), "unet.mid_block.resnets.0.conv1.lora_B.weight"
    changes = {
        "missing": {key: None},
        "unexpected": {key + "x": torch.zeros(1)},
        "shape": {key: torch.zeros(3, 4, 1, 1)},
    }
    for name, change in changes.items():
        folder = tmp_path / name
        shutil.copytree(lora_path / "node-0001", folder)
        save_file({k: v for k, v in (state | change).items() if v is not None}, folder / FILE)
        with pytest.raises(ModelError, match=str(folder)):
            load_adapter(network, folder, world)
        assert all(torch.equal(v, live[k]) for k, v in adapter_parameters(network).items())
        with pytest.raises(ModelError, match=f"{folder}.*mid_block.resnets.0.conv1"):
            load_merged(teacher, folder, torch.float32)
    note = tmp_path / "base" / "disback.json"
    shutil.copytree(lora_path / "node-0001", note.parent)
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
