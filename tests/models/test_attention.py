"""Attention kernels, compilation and memory format: the same mathematics, to rounding; refusals say why."""

import copy

import pytest
import support
import torch
from diffusers.models.attention import BasicTransformerBlock

from models.attention import (
    KERNELS,
    attention_shapes,
    choose_kernel,
    install_processors,
    kernel_report,
    prefer_kernel,
    try_kernel,
)
from models.compile import compile_blocks
from models.conditioning import Conditioning
from models.denoise import predict
from models.errors import ModelError
from models.miniature import build_miniature
from models.settings import MiniatureSettings
from trainer.backtrack import Backtracking
from trainer.config.schema import OptimizerSettings
from trainer.errors import UserError

CPU = torch.device("cpu")
BATCH, SIDE, TOKENS = 2, 16, 16


@pytest.fixture(scope="module")
def unet():
    return build_miniature(MiniatureSettings(resolution=2 * SIDE)).unet


def inputs(device="cpu", batch=BATCH):
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, 4, SIDE, SIDE), (batch, TOKENS, 64), (batch, 32), (batch, 6))
    x, states, pooled, ids = (torch.randn(size, generator=generator).to(device) for size in sizes)
    t = torch.linspace(3, 700, batch, device=device).long()
    return x, t, Conditioning(states, pooled, ids)


def selected(shape, dtype, device):
    """The kernel that PyTorch itself would now choose for a shape."""
    sizes = (shape.queries, shape.keys, shape.keys)
    query, key, value = (torch.empty(1, 1, n, shape.head_size, dtype=dtype, device=device) for n in sizes)
    number = torch._fused_sdp_choice(query, key, value)
    return next((name for name, kernel in KERNELS.items() if int(kernel) == number), "none")


def shapes_of(unet):
    return attention_shapes(unet, lambda twin: predict(twin, *inputs("meta", 1)))


def test_shapes_are_the_networks(unet):
    # One stage of the miniature has attention: 96 channels in 2 heads, at half the side; to itself and to the text.
    own = SIDE * SIDE // 4
    assert shapes_of(unet) == [(48, own, own), (48, own, TOKENS)]


@pytest.mark.parametrize("kernel", ["flash", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_agree_with_diffusers(unet, kernel, dtype):
    plain = copy.deepcopy(unet).to(dtype)
    ours = copy.deepcopy(plain)
    assert install_processors(ours, kernel) == 8  # four transformer blocks, two attentions each
    expected = predict(plain, *inputs())
    expected.square().mean().backward()
    with prefer_kernel(kernel, CPU):
        assert {selected(shape, dtype, CPU) for shape in shapes_of(unet)} == {kernel}
        result = predict(ours, *inputs())
        result.square().mean().backward()
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    assert (result - expected).abs().max() < limit * expected.abs().max()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= limit * theirs.grad.norm() + 1e-6, name


def test_the_choice_of_the_process_comes_back(unet):
    shape = shapes_of(unet)[0]
    before = selected(shape, torch.float32, CPU)
    with prefer_kernel("math", CPU):
        assert selected(shape, torch.float32, CPU) == "math" != before
    assert selected(shape, torch.float32, CPU) == before


def test_auto_says_what_runs_and_why_not_the_others(unet):
    shapes = tuple(shapes_of(unet))
    name, others = choose_kernel("auto", shapes, torch.float32, CPU)
    assert name == "flash" and set(others) == {"cudnn", "efficient", "math", "xformers"}
    lines = kernel_report(name, others, list(shapes), torch.float32)
    assert lines[0].startswith("attention: flash (float32; head size 48")
    assert any("not cudnn" in line and "no such kernel for this device" in line for line in lines)
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize("asked", ["cudnn", "efficient", "xformers"])
def test_a_kernel_that_cannot_run_is_refused_with_the_reason(unet, asked):
    with pytest.raises(
        ModelError, match=rf"network.attention={asked} cannot run here \(cpu, float32, .*: use auto"
    ) as e:
        choose_kernel(asked, tuple(shapes_of(unet)), torch.float32, CPU)
    assert "\n" not in str(e.value)


def test_a_kernel_with_wrong_results_is_refused(unet, monkeypatch):
    shape = shapes_of(unet)[0]
    assert try_kernel("flash", shape, torch.float32, CPU) is None
    real = torch.nn.functional.scaled_dot_product_attention

    def wrong(query, key, value):
        flash = selected(shape, torch.float32, CPU) == "flash"
        return real(query, key, value) * (1.1 if flash else 1.0)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    assert "off by" in try_kernel("flash", shape, torch.float32, CPU)
    assert try_kernel("math", shape, torch.float32, CPU) is None and set(KERNELS) >= {"flash", "math"}


def test_roles_that_cannot_be_laid_out_or_compiled(shards, pipeline, world):
    flags = [f"pipeline={pipeline}", "backtrack.path=none", "network.channels_last=true"]
    run = support.single(shards, "kernels", world, *flags)
    folder = run.stage_folder("backtrack")
    stage = Backtracking(run)
    try:
        said = (folder / "log.txt").read_text()
        for name, role in stage.roles.items():
            last = role.module.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
            ignored = f"{name}: ignores network.channels_last: DeepSpeed keeps these weights flat" in said
            assert (last, ignored) == ((True, False) if name == "teacher" else (False, True)), name
        run.settings.network.compile = True
        missing = pipeline / "none"  # refused before anything is read
        for name, trained in (("teacher", None), ("zero3", OptimizerSettings(lr=1e-6))):
            with pytest.raises(UserError, match=rf"network.compile=true does not work with ZeRO-3 \(late: {name}\)"):
                stage.builder.build("late", missing, name, trained)
    finally:
        stage.close()


def test_a_compiled_block_agrees(unet, monkeypatch):
    """Captured by dynamo and differentiated ahead of time, then run by PyTorch's own kernels: Inductor would compile C++."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kw: real(module, backend="aot_eager", **kw))
    block = next(m for m in copy.deepcopy(unet).modules() if isinstance(m, BasicTransformerBlock))
    plain = copy.deepcopy(block)
    assert compile_blocks(block) == 1
    x, states = torch.randn(2, 16, 96), torch.randn(2, TOKENS, 64)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for net in (plain, block):
        net(x, encoder_hidden_states=states).square().mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before  # it was compiled
    for mine, theirs in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
