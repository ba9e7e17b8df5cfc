"""The GAN term: its scale, its features, its head, its network calls, its engines, its resume."""

import pytest
import support
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss, softplus
from torch.utils.flop_counter import FlopCounterMode

from models.conditioning import Conditioning
from models.denoise import predict
from models.errors import ModelError
from models.gan import (
    Discriminator,
    Head,
    feature_module,
    feature_shape,
    generator_gradient,
    head_logits,
    predict_with_logits,
)
from models.pipeline import load_network
from trainer.backtrack import Backtracking
from trainer.errors import UserError

LATENTS = (4, 4, 4)


@pytest.fixture
def net(root) -> Discriminator:
    return Discriminator(load_network(root / "base" / "pipeline" / "unet"), LATENTS, seed=3).requires_grad_(True)


def inputs(batch=3):
    rng = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(batch, *LATENTS, generator=rng), torch.tensor([10, 400, 900])[:batch]
    states, pooled = torch.randn(batch, 16, 16, generator=rng), torch.randn(batch, 16, generator=rng)
    return x_t, t, Conditioning(states, pooled, torch.ones(batch, 6))


def test_published_weights_carry_over():
    """The gradient on the generator's weights is that of DMD2's own loss: 0.5 mse(x0, sg(x0 - g)) + w mean softplus(-D)."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    weight, z, g, head = draw(4, 4, 1, 1).requires_grad_(), draw(5, 4, 3, 3), draw(5, 4, 3, 3), draw(2, 4, 3, 3)
    patches = lambda x: torch.einsum("bchw,pchw->bp", x, head)  # noqa: E731
    x0 = nn.functional.conv2d(z, weight)
    loss = 0.5 * mse_loss(x0, (x0 - g).detach()) + 5e-3 * softplus(-patches(x0)).mean()
    (theirs,) = torch.autograd.grad(loss, weight)
    x0 = nn.functional.conv2d(z, weight)
    leaf = x0.detach().requires_grad_()
    push, value = generator_gradient(patches(leaf), leaf, 5e-3)
    (ours,) = torch.autograd.grad((x0 * (g + push)).mean(), weight)
    (without,) = torch.autograd.grad((nn.functional.conv2d(z, weight) * g).mean(), weight)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7) and not torch.allclose(without, theirs, rtol=1e-2)
    assert torch.allclose(value, softplus(-patches(leaf)).mean())


def test_one_pass_and_the_encoder_alone_agree(net):
    """With or without the decoder: the same logits, and the network's own prediction, but for rounding."""
    x_t, t, cond = inputs()
    plain = predict(net.network, x_t, t, cond)
    logits = {"encoder alone": head_logits(net, x_t, t, cond)}
    for decoder_grad in (True, False):
        prediction, logits[f"{decoder_grad=}"] = predict_with_logits(net, x_t, t, cond, decoder_grad)
        torch.testing.assert_close(prediction, plain, **support.ROUNDING)
        assert prediction.requires_grad == decoder_grad
    net._plain = False  # as a network whose encoder cannot be run alone
    logits["whole network"] = head_logits(net, x_t, t, cond)
    torch.testing.assert_close(predict(net, x_t, t, cond), plain, **support.ROUNDING)
    for how, value in logits.items():
        torch.testing.assert_close(value, logits["encoder alone"], **support.ROUNDING, msg=how)
        assert value.requires_grad, how
    assert torch.is_grad_enabled() and not net.network.mid_block._forward_hooks


def test_the_gradient_on_the_sample_reaches_nothing_else(net):
    x_t, t, cond = inputs()
    leaf = x_t.requires_grad_()
    logits = predict_with_logits(net, leaf, t, cond, decoder_grad=False)[1], head_logits(net, leaf, t, cond)
    gradients = [generator_gradient(value, leaf, 1.0)[0] for value in logits]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))
    assert gradients[0].abs().max() > 0
    assert leaf.grad is None and all(p.grad is None for p in net.parameters())


def test_the_head_is_a_function_of_the_seed(root, net):
    unet = load_network(root / "base" / "pipeline" / "unet")
    state = torch.get_rng_state()
    same, other = (Discriminator(unet, LATENTS, seed).head.state_dict() for seed in (3, 4))
    assert torch.equal(state, torch.get_rng_state())
    mine = net.head.state_dict()
    assert all(torch.equal(mine[k], same[k]) for k in mine) and any(not torch.equal(mine[k], other[k]) for k in mine)
    keys = {k.split(".")[0] for k in net.state_dict()}
    assert keys == {"network", "head"}
    assert {k[len("network.") :] for k in net.state_dict() if k.startswith("network.")} == unet.state_dict().keys()


def test_heads_of_real_sizes():
    """SDXL at 1024 px (1280 x 32 x 32 features), SD 1.5 at 512 px (8 x 8), an oblong, the miniature."""
    with torch.device("meta"):
        for shape, patches in (
            ((1280, 32, 32), (2, 2)), ((1280, 8, 8), (2, 2)), ((1280, 24, 42), (1, 2)), ((32, 2, 2), (2, 2)),
        ):  # fmt: skip
            assert Head(*shape)(torch.empty(3, *shape)).shape == (3, 1, *patches), shape


def test_features_of_the_middle(net):
    caught = []
    feature_module(net.network).register_forward_hook(lambda m, i, o: caught.append(o))
    _, t, cond = inputs(1)
    for side in (4, 5):
        predict(net.network, torch.zeros(1, 4, side, side), t[:1], cond)
        assert tuple(caught[-1].shape[1:]) == feature_shape(net.network, (4, side, side))
    with pytest.raises(ModelError, match="Linear has no mid_block"):
        feature_module(nn.Linear(1, 1))


def test_mistakes_are_named():
    for flags, words in (
        (["gan.timesteps=[0.0, 0.5]"], "gan.shared_pass=false"),
        (["gan.timesteps=[0.5, 0.2]", "gan.shared_pass=false"], "0 <= low < high <= 1"),
    ):
        with pytest.raises(UserError, match=words):
            support.load_settings(support.TINY, flags)


def counted(run, steps=2) -> tuple[dict, float]:
    """(batches of samples through each network's first and last layer, FLOP without text encoders and autoencoder over
    the stage's own count) of some steps."""
    stage = Backtracking(run)
    stage.begin(0)
    rows: dict[str, float] = {}
    for name, role in stage.roles.items():
        unet = getattr(role.module, "network", role.module)
        for part in ("conv_in", "conv_out"):

            def hook(module, args, output, key=f"{name}.{part}"):
                rows[key] = rows.get(key, 0) + len(output) / stage.micro

            getattr(unet, part).register_forward_hook(hook)

    def flops(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    with sdpa_kernel(SDPBackend.MATH):  # the one that the counter counts on a CPU
        whole = flops(lambda: [stage.update(step) for step in range(steps)])
        captions = ["a handwritten seven"] * stage.micro
        whole -= steps * flops(lambda: stage.sampler.text.encode(captions, stage.sampler.size))
        if stage.gan:
            latents = torch.zeros(stage.micro, *LATENTS)
            whole -= steps * flops(lambda: stage.sampler.encode(torch.zeros(stage.micro, 3, 8, 8), latents))
    stage.close()
    return rows, whole / steps / stage.flops


@pytest.mark.parametrize(
    ("flags", "generator", "target", "encoder", "full"),
    [
        ([], 2, 2, 3, 3),
        (["gan.enabled=true"], 2, 2, 5, 3),  # two more encoder passes: the real samples of two updates
        (["gan.enabled=true", "gan.shared_pass=false"], 2, 2, 8, 3),  # and the generated ones, of updates and turn
        (["gan.enabled=true", "backtrack.reuse_x0=true", "backtrack.guidance_scale=1"], 1, 1, 5, 3),
    ],
)
def test_network_calls(root, world, flags, generator, target, encoder, full):
    """One generator turn and two fake updates, in batches; and the FLOP that the metrics are reckoned from."""
    run = support.single(root, "calls", world, "backtrack.fake_updates=2", *flags)
    rows, share = counted(run)
    assert rows == {
        "generator.conv_in": generator, "generator.conv_out": generator, "teacher.conv_in": target,
        "teacher.conv_out": target, "fake_score.conv_in": encoder, "fake_score.conv_out": full,
    }  # fmt: skip
    assert 0.97 < share < 1  # the first layers' input gradients are not computed


def test_images_are_encoded_before_there_is_a_graph(root, world, monkeypatch):
    """One image at a time at 1024 px, and before the fake score's pass: nothing is in memory next to the autoencoder."""
    run = support.single(root, "encoding", world, "gan.enabled=true", "backtrack.fake_updates=2")
    stage = Backtracking(run)
    assert stage.sampler._per_call((1024, 1024)) == 1
    monkeypatch.setattr("models.sampler.VAE_PIXELS", 8**2)  # one image of this run
    stage.begin(0)
    calls = []
    stage.sampler.vae.encoder.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))

    def training(module, args):
        if torch.is_grad_enabled() and not args[0].requires_grad:  # else in the generator's turn
            calls.append("fake score")

    stage.fake_score.module.register_forward_pre_hook(training)
    for step in range(2):
        calls.clear()
        stage.update(step)
        assert calls == [*[1] * stage.micro, "fake score", "fake score"]
    stage.close()


def losses(folder) -> list[dict]:
    """What must agree, from the lines of logging intervals (those of target switches have none)."""
    keys = ("loss/gan_generator", "loss/gan_head", "loss/fake_score", "grad_norm/fake_score", "mismatch")
    lines = support.metrics(folder / "backtrack")
    return [{key: line[key] for key in keys} for line in lines if line["loss/fake_score"] is not None]


@pytest.mark.slow
def test_two_ranks_train_as_one(root, world):
    """Shared passes with a two-step student in pieces at ZeRO 2, and passes of their own with the walk at sharded ZeRO 3, with
    accumulation and clipping. test_everything has shared passes at both."""
    support.ranks("gan", root)
    for shared in (True, False):
        run = support.single(
            root, f"gan-one-{shared}", world, *support.gan_flags(shared), "backtrack.generator_split=1"
        )
        one, lines = support.backtrack_weights(run), losses(run.folder)
        two = torch.load(root / "gan" / f"{shared}.pt")
        assert any(k.startswith("fake_score.head.") for k in two)
        assert support.largest_difference(one, two) < 1e-5
        for theirs, ours in zip(losses(root / f"gan-two-{shared}"), lines, strict=True):
            assert theirs == pytest.approx(ours, rel=2e-3)
    plain = support.single(root, "gan-none", world, *support.gan_flags(shared), "gan.enabled=false")
    without = support.backtrack_weights(plain)  # the comparison above would see a lost term
    assert max(float((one[k] - v).abs().max()) for k, v in without.items() if k.startswith("generator")) > 1e-5


def test_resumes_bit_for_bit_and_learns(root, world):
    flags = [*support.GAN, "backtrack.fake_updates=2", "backtrack.reuse_x0=true", "backtrack.accumulation=2"]
    flags += ["backtrack.student_timesteps=[999, 499]", "backtrack.path=none", "backtrack.loop.log_every=2"]
    whole = support.backtrack_weights(support.single(root, "gan-whole", world, *flags))
    run = support.single(root, "gan-parts", world, *flags)
    assert support.backtrack_weights(run, signal_at=(3,)) is None
    parts = support.backtrack_weights(run)
    assert support.largest_difference(whole, parts) == 0.0
    lines = support.metrics(run.folder / "backtrack")
    assert lines == support.metrics(root / "gan-whole" / "backtrack")
    assert all(line["loss/gan_head"] > 0 and line["loss/gan_generator"] > 0 for line in lines)
    start = Discriminator(load_network(root / "base" / "pipeline" / "unet"), LATENTS, run.settings.seed)
    heads = {k: v for k, v in start.state_dict().items() if k.startswith("head.")}
    assert all(not torch.equal(whole[f"fake_score.{k}"], v) for k, v in heads.items() if v.numel() > 1)
    # What is written for others is the generator alone, loaded strictly; the head stays in the engine's checkpoint.
    load_network(run.folder / "backtrack" / "checkpoints" / "step-00000008" / "weights")
    other = support.single(root, "gan-parts", world, *flags, "gan.head_weight=0.1")
    with pytest.raises(UserError, match=r"gan.head_weight was 0.5, is now 0.1"):
        support.backtrack_weights(other)
