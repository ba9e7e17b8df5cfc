"""Memory that fits: weights straight into their slices, nodes read and written in the background, recomputed
activations, states in host memory, networks sharded within a node."""

import json
import shutil
from functools import partial

import pytest
import support
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.errors import ModelError
from models.pipeline import WEIGHTS_FILE, empty_network, load_network
from models.tensorfile import TensorFile, write_tensors
from trainer.backtrack import Backtracking
from trainer.config.deepspeed import deepspeed_config
from trainer.config.schema import OptimizerSettings
from trainer.engine.role import Role
from trainer.engine.save_weights import FolderWriter, save_folder
from trainer.errors import UserError
from trainer.path.manifest import file_hash
from trainer.record import _move
from trainer.training.run import Run


def test_ranges_of_a_file_that_the_library_wrote(tmp_path):
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.zeros(0), "d": torch.tensor(4)}
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "f")
    assert file.shapes == {k: tuple(v.shape) for k, v in tensors.items()}
    assert torch.equal(file.read("a", 3, 33), tensors["a"].reshape(-1)[3:33])
    assert torch.equal(file.read("b", 0, 3), tensors["b"]) and file.read("c", 0, 0).numel() == 0
    assert file.read("d", 0, 1).item() == 4
    file.close()
    raw = (tmp_path / "f").read_bytes()
    for cut in (0, 5, 60, len(raw) - 1):
        (tmp_path / "f").write_bytes(raw[:cut])
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            TensorFile(tmp_path / "f")


def test_a_file_that_we_wrote_in_the_library(tmp_path):
    tensors = {"a": torch.randn(700, 5), "b": torch.randn(3, 2).bfloat16().t(), "c": torch.arange(3)}
    digest, size = write_tensors(tmp_path / "f", tensors)
    assert (file_hash(tmp_path / "f"), (tmp_path / "f").stat().st_size) == (digest, size)
    again = load_file(tmp_path / "f")
    assert again.keys() == tensors.keys() and all(torch.equal(v, again[k]) for k, v in tensors.items())
    with safe_open(tmp_path / "f", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3", "sharded"])
def test_float32_weights_reach_the_optimizer_of_a_bfloat16_role(root, world, stage, tmp_path):
    folder = root / "base" / "pipeline" / "unet"
    generator = torch.Generator().manual_seed(0)
    exact = {
        k: v + 1e-3 * torch.randn(v.shape, generator=generator) for k, v in load_network(folder).state_dict().items()
    }
    save_folder(exact, dict(load_network(folder).config), tmp_path / "exact", torch.float32)
    name = support.sharded_zero3(tmp_path) if stage == "sharded" else stage
    config = deepspeed_config(name, 2, 1, 0.0, "bf16", world.size)
    network = empty_network(tmp_path / "exact")
    role = Role("generator", network, config, world, OptimizerSettings(lr=1e-5), tmp_path / "exact")
    assert all(torch.equal(v, exact[k].bfloat16()) for k, v in role.state_dict().items())
    if stage == "zero0":
        masters = dict(zip([s.key for s in role.weights.slices], role.optimizer.fp32_groups[0], strict=True))
    else:
        masters = {s.key: safe_get_full_fp32_param(s.parameter) for s in role.weights.slices}
    assert all(torch.equal(m, exact[k]) for k, m in masters.items())


def test_a_node_that_breaks_during_training(root, world, tmp_path):
    """Nodes are verified when training starts; what happens to them later ends in one clear message."""
    shutil.copytree(root / "base" / "path", tmp_path / "path")
    stage = Backtracking(Run(support.tiny(root, "breaks", f"path={tmp_path / 'path'}"), world))
    file = tmp_path / "path" / "node-0002" / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=rf"target node 2 cannot be loaded at generator update 0: {file}: not a whole"):
        stage.begin(0)
    stage.close()


def test_a_node_that_cannot_be_written(root, world, tmp_path):
    writer = FolderWriter(world)
    (tmp_path / "file").write_text("in the way")
    write, state = partial(save_folder, config={}), {"a": torch.zeros(2)}
    writer.begin(write, state, tmp_path / "good", {"step": 1})
    writer.begin(write, state, tmp_path / "file" / "bad", {"step": 2})
    with pytest.raises(UserError, match="weights could not be written"):
        writer.join()
    assert json.loads((tmp_path / "good" / "node.json").read_text())["step"] == 1
    writer.join()
    writer.close()


def test_candidates_are_renamed_once(tmp_path):
    candidate, node = tmp_path / "candidates" / "step-00000004", tmp_path / "node-0001"
    save_folder({"a": torch.zeros(2)}, {}, candidate, about={"step": 4})
    about = _move(candidate, node)
    assert about[1:] == (file_hash(tmp_path / about[0]), (tmp_path / about[0]).stat().st_size)
    assert not candidate.exists() and _move(candidate, node) == about  # killed after the rename, and started again
    with pytest.raises(UserError, match=r"step-00000005 is missing"):
        _move(candidate.with_name("step-00000005"), node)


@pytest.fixture(scope="module")
def plain(root, world):
    return support.backtrack_weights(support.single(root, "memory-plain", world, *support.PARITY, "backtrack.steps=4"))


@pytest.mark.parametrize("stage", ["zero0", "sharded"])
def test_checkpointing_trains_the_same(plain, root, world, stage, tmp_path):
    flags = [*support.PARITY, "backtrack.steps=4", "network.checkpointing=true"]
    name = support.sharded_zero3(tmp_path) if stage == "sharded" else stage
    run = support.single(root, f"checkpointing-{stage}", world, *flags, *support.zero(name))
    assert support.largest_difference(plain, support.backtrack_weights(run)) < 1e-6


@pytest.mark.parametrize("stage", ["zero2_offload", "zero3_offload"])
def test_offloaded_states_train_the_same(plain, root, world, stage):
    flags = [f"backtrack.{role}_ds_config={stage}" for role in ("generator", "fake_score")]
    run = support.single(root, f"offload-{stage}", world, *support.PARITY, "backtrack.steps=4", *flags)
    assert support.largest_difference(plain, support.backtrack_weights(run)) < 1e-6


@pytest.mark.slow
def test_many_switches_on_two_ranks(root):
    support.ranks("switches", root)


@pytest.mark.slow
def test_a_rank_holds_its_own_part_only(tmp_path):
    # A fixed threshold: blocks that are given back leave the process, and the measure does not depend on what glibc keeps.
    support.ranks("loading", tmp_path, MALLOC_MMAP_THRESHOLD_="65536")
