"""Roles that fit into memory: weights loaded straight into their slices, offloaded optimizer states, nodes into shards."""

import pytest
import support
import torch
from deepspeed.utils import safe_get_full_fp32_param

from models.pipeline import empty_network, load_network
from trainer.config.deepspeed import deepspeed_config
from trainer.config.schema import OptimizerSettings
from trainer.engine.role import Role
from trainer.engine.save_weights import Snapshot


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3", "sharded"])
def test_float32_weights_reach_the_optimizer_of_a_bfloat16_role(root, world, stage, tmp_path):
    folder = root / "base" / "pipeline" / "unet"
    generator = torch.Generator().manual_seed(0)
    exact = {
        k: v + 1e-3 * torch.randn(v.shape, generator=generator) for k, v in load_network(folder).state_dict().items()
    }
    Snapshot.of_network(exact, dict(load_network(folder).config)).write(tmp_path / "exact")
    name = support.sharded_zero3(tmp_path) if stage == "sharded" else stage
    config = deepspeed_config(name, 2, 1, 0.0, "bf16", world.size)
    network = empty_network(tmp_path / "exact")
    role = Role("generator", network, config, world, OptimizerSettings(lr=1e-5), tmp_path / "exact")
    assert all(torch.equal(v, exact[k].bfloat16()) for k, v in role.state_dict().items())
    if stage == "zero0":
        masters = dict(zip([s.key for s in role.weights.slices], role.engine.optimizer.fp32_groups[0], strict=True))
    else:
        masters = {s.key: safe_get_full_fp32_param(s.parameter) for s in role.weights.slices}
    assert all(torch.equal(m, exact[k]) for k, m in masters.items())


@pytest.fixture(scope="module")
def plain(root, world):
    return support.backtrack_weights(support.single(root, "memory-plain", world, *support.PARITY, "backtrack.steps=4"))


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
    support.torchrun("loading", tmp_path, 2, MALLOC_MMAP_THRESHOLD_="65536")
