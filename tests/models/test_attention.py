"""Attention kernels, compilation and memory format: the same mathematics, to rounding; refusals say why."""

import copy

import pytest
import support
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch.utils.checkpoint import checkpoint

from models import attention
from models.attention import (
    KERNELS,
    AttentionShape,
    attention_shapes,
    choose_kernel,
    falls_through,
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
    return attention_shapes(unet, lambda twin: predict(twin, *inputs("meta")))


def test_shapes_are_the_networks(unet):
    # One stage of the miniature has attention: 96 channels in 2 heads, at half the side; to itself and to the text.
    # In memory the heads of a token lie side by side: the layout of the projections.
    own = SIDE * SIDE // 4
    laid_out = {n: (n * 96, 48, 96, 1) for n in (own, TOKENS)}
    for shape, keys in zip(shapes_of(unet), (own, TOKENS), strict=True):
        assert shape[:5] == (48, own, keys, BATCH, 2)
        assert shape.strides == (laid_out[own], laid_out[keys], laid_out[keys])


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


def test_auto_says_what_runs_and_why_not_those_before_it(unet, monkeypatch):
    tried = []
    monkeypatch.setattr(attention, "try_kernel", lambda name, *args: tried.append(name) or try_kernel(name, *args))
    shapes = tuple(shapes_of(unet))
    name, others = choose_kernel("auto", shapes, torch.float32, CPU)
    assert name == "flash" and tried == ["cudnn", "flash", "flash"]  # until one works for both shapes
    lines = kernel_report(name, others, list(shapes), torch.float32)
    assert lines[0].startswith("attention: flash (float32; 2 heads of 48, 64 queries x 64 keys; ")
    assert len(lines) == 2 and "not cudnn" in lines[1] and "no such kernel for this device" in lines[1]
    assert all("\n" not in line for line in lines)


def test_kernels_are_tried_as_the_network_calls_them(unet, monkeypatch):
    """The trial's calls, forward and backward, are those of a forward pass with two samples: sizes, strides and order."""
    real, shapes, calls = torch.nn.functional.scaled_dot_product_attention, shapes_of(unet), []

    def watched(*tensors):
        out, call = real(*tensors), [(x.shape, x.stride()) for x in tensors]
        calls.append(call)
        if out.requires_grad:
            out.register_hook(lambda grad: call.append((grad.shape, grad.stride())))
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    ours = copy.deepcopy(unet)
    install_processors(ours, "flash")
    predict(ours, *inputs()).square().mean().backward()
    network = {tuple(call) for call in calls}
    assert len(network) == 2 and {len(call) for call in network} == {4}
    for shape in shapes:
        calls.clear()
        assert try_kernel("flash", shape, torch.float32, CPU) is None
        network.remove(tuple(calls[0]))  # the other calls of a trial compute what is expected


def test_without_a_plan_the_next_kernel_runs(caplog):
    """cuDNN's message where it has no plan for a shape: such a shape goes to the other kernels, others do not, and other errors
    are raised."""

    def attend(query, key, value):
        if selected(AttentionShape(48, query.shape[2], key.shape[2], 1, 1, ()), query.dtype, CPU) == "math":
            return real(query, key, value)
        calls.append(query.shape[2])
        if query.shape[2] == 7:
            raise RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.")
        if query.shape[2] == 9:
            raise RuntimeError("out of something else")
        return real(query, key, value)

    real, calls = torch.nn.functional.scaled_dot_product_attention, []
    attention_ = falls_through(attend, [KERNELS["math"]])
    odd, even = (torch.randn(2, 2, n, 48) for n in (7, 8))
    for _ in range(2):
        torch.testing.assert_close(attention_(odd, even, even), real(odd, even, even))
        attention_(even, even, even)
    assert calls == [7, 8, 8, 8] and caplog.text.count("cuDNN fails for (2, 2, 7, 48) x (2, 2, 8, 48)") == 1
    with pytest.raises(RuntimeError, match="something else"):
        attention_(torch.randn(2, 2, 9, 48), even, even)


class NoBackward(torch.autograd.Function):
    """cuDNN where it has a plan for the forward pass only."""

    @staticmethod
    def forward(query, key, value):
        return torch.ops.aten.scaled_dot_product_attention(query, key, value)

    @staticmethod
    def setup_context(context, inputs, output):
        pass

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.")


@pytest.mark.parametrize("recomputed", [False, True])
def test_without_a_plan_for_the_backward_pass_the_next_kernel_runs(caplog, recomputed):
    def attend(*tensors):
        math = selected(AttentionShape(48, 8, 8, 1, 1, ()), torch.float32, CPU) == "math"
        return real(*tensors) if math else NoBackward.apply(*tensors)

    real, gradients = torch.nn.functional.scaled_dot_product_attention, []
    attention_ = falls_through(attend, [KERNELS["math"]])
    x = torch.randn(2, 2, 8, 48)
    with torch.no_grad():  # as the pass before a recomputed one: it says nothing about gradients
        assert attention_(x, x, x).grad_fn is None
    assert not caplog.records
    for function in (real, attention_, attention_):
        leaf = x.clone().requires_grad_()
        out = checkpoint(function, leaf, leaf, leaf, use_reentrant=False) if recomputed else function(leaf, leaf, leaf)
        gradients += torch.autograd.grad(out.square().sum(), leaf)
    assert caplog.text.count("cuDNN fails for (2, 2, 8, 48)") == 1
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-5)


def test_fall_through_is_in_place_only_where_cudnn_is_preferred(monkeypatch):
    real = torch.nn.functional.scaled_dot_product_attention
    with prefer_kernel("flash", CPU):
        assert torch.nn.functional.scaled_dot_product_attention is real
    with prefer_kernel("cudnn", CPU):
        wrapped = torch.nn.functional.scaled_dot_product_attention
        x = torch.randn(1, 1, 8, 48)
        assert wrapped is not real and torch.equal(wrapped(x, x, x), real(x, x, x))
    assert torch.nn.functional.scaled_dot_product_attention is real


@pytest.mark.parametrize("asked", ["cudnn", "efficient", "xformers"])
def test_a_kernel_that_cannot_run_is_refused_with_the_reason(unet, asked):
    with pytest.raises(
        ModelError, match=rf"network.attention={asked} cannot run here \(cpu, float32, .*: use auto"
    ) as e:
        choose_kernel(asked, tuple(shapes_of(unet)), torch.float32, CPU)
    assert "\n" not in str(e.value)


def test_the_reason_is_not_that_the_others_were_switched_off():
    """PyTorch warns of every kernel of the GPU, also of those that were not asked for."""
    warned = [
        "Memory efficient kernel not used because: (Triggered internally at sdp_utils.cpp:951.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at sdp_utils_cpp.h:553.)",
        "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:953.)",
        "Expected query, key and value to all be of dtype: {Half, BFloat16}. (Triggered internally at sdp_utils.h:90.)",
        "CuDNN attention has been runtime disabled. (Triggered internally at sdp_utils.cpp:846.)",
    ]
    reason = attention._reason(RuntimeError("No available kernel. Aborting execution."), warned)
    assert reason == "Expected query, key and value to all be of dtype: {Half, BFloat16}."


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
