"""Which kernels a run may use, and what it does not ask of the device."""

import os

import pytest
import support
import torch
from torch import nn

from models.compile import checkpoint_blocks, set_deterministic
from models.pipeline import load_network
from trainer.encode import Part
from trainer.errors import UserError


def predicted(net: nn.Module) -> torch.Tensor:
    """The output for two samples; all inputs are ones."""
    size, side, t = net.config, net.config.sample_size, torch.tensor([10, 700])
    x = torch.ones(2, size.in_channels, side, side)
    if "pooled_projection_dim" in size:
        states, pooled = torch.ones(2, 8, size.joint_attention_dim), torch.ones(2, size.pooled_projection_dim)
        return net(x, states, pooled, t)[0]
    added = {"text_embeds": torch.ones(2, support.SMALLEST["pooled"]), "time_ids": torch.ones(2, 6)}
    return net(x, t, torch.ones(2, 8, size.cross_attention_dim), added_cond_kwargs=added)[0]


def gradients(net: nn.Module) -> list[torch.Tensor]:
    """Of a network in training, on fixed inputs, with a fixed seed of the global generator."""
    torch.manual_seed(0)
    net.zero_grad()
    with torch.enable_grad():
        predicted(net).square().sum().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_saves_generators_only_for_dropout(pipelines, monkeypatch, kind, dropout):
    """Nothing but dropout draws numbers in a network, so recomputed blocks are the same without their states."""
    net, saved = load_network(pipelines[kind] / ("unet" if kind == "sdxl" else "transformer")).train(), []
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    torch.manual_seed(0)
    before = torch.get_rng_state()
    predicted(net)
    assert torch.equal(before, torch.get_rng_state()) == (dropout == 0)
    plain, get_rng_state = gradients(net), torch.get_rng_state
    checkpoint_blocks(net)
    monkeypatch.setattr(torch, "get_rng_state", lambda: saved.append(1) or get_rng_state())
    again = gradients(net)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert bool(saved) == (dropout > 0)


def test_deterministic_runs_refuse_what_is_not(shards, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    try:
        set_deterministic(True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.backends.cudnn.benchmark
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.empty(2).put_(torch.tensor([0]), torch.tensor([1.0]))
    finally:
        set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    for kernel in ("xformers", "cudnn"):
        with pytest.raises(UserError, match=f"attention={kernel}, which PyTorch cannot make deterministic: use auto"):
            support.tiny(shards, "refused", "network.deterministic=true", f"network.attention={kernel}")


def test_encoding_works_on_its_own_gpu(monkeypatch):
    """Kernels that start on the current GPU must not start on the first one, where another process encodes."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("trainer.encode.check_group", lambda device: (2, 4, 2))  # waits for the other three
    assert Part.of_environment().device == torch.device("cuda", 2) and chosen == [torch.device("cuda", 2)]
