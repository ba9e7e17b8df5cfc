"""One role's updates."""

import pytest
import support
import torch

from models.pipeline import empty_network, load_network
from trainer.config.deepspeed import deepspeed_config
from trainer.config.schema import OptimizerSettings
from trainer.engine.role import Role


def loss_of(network, generator) -> torch.Tensor:
    x, states = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 16, 16, generator=generator)
    added = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.ones(2, 6)}
    return network(x, torch.tensor([10, 700]), states, added_cond_kwargs=added)[0].square().mean()


@pytest.mark.parametrize("stage", ["zero0", "zero2", "sharded"])
def test_the_norm_is_kept_when_wanted(root, world, stage, tmp_path):
    """Before clipping, over both micro-steps of an accumulation, and part of what a resumed run remembers."""
    folder = root / "base" / "pipeline" / "unet"
    name = support.sharded_zero3(tmp_path) if stage == "sharded" else stage
    config = deepspeed_config(name, 2, 2, 1e-3, "fp32", world.size)
    role = Role("generator", empty_network(folder), config, world, OptimizerSettings(lr=1e-5), folder)
    plain, generator = load_network(folder), torch.Generator().manual_seed(0)
    for keep in (False, True):
        before = role.last_norm
        role.keep_norm = keep
        for _ in range(2):
            (loss_of(plain, torch.Generator().set_state(generator.get_state())) / 2).backward()
            role.step(loss_of(role, generator), 0.0)
        if keep:
            expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
            assert float(role.last_norm) == pytest.approx(float(expected), rel=1e-4)
        else:
            assert role.last_norm is before is None
        plain.zero_grad()
    state, role.last_norm = role.watch_state(), None
    role.load_watch_state(state)
    assert role.last_norm == pytest.approx(float(expected), rel=1e-4)
