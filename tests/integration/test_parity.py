"""Two ranks train what one process with the whole batch trains, at every ZeRO stage, and with recomputed activations what it
trains without.

What each cell protects: zero0, zero2: reduction and partitions of whole networks over all nodes of the walk. mixed: ZeRO 3
with half of the parameters sharded and half gathered, as real networks have it. ZeRO 3 with every parameter sharded is in
test_elastic, with the GAN term in test_gan, with adapters in test_everything; ZeRO 1 in test_weight_average.
"""

import pytest
import support
import torch

from models.pipeline import load_network

FLAGS = (*support.PARITY, "backtrack.steps=6")
STAGES = ("zero0", "zero2", "mixed")


@pytest.fixture(scope="module")
def plain(root, world):
    """One process, ZeRO 0."""
    run = support.single(root, "one", world, *FLAGS, *support.zero("zero0"))
    return support.backtrack_weights(run), support.metrics(run.folder / "backtrack")


@pytest.fixture(scope="module")
def double(root):
    support.ranks("parity", root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_as_one(plain, double, stage):
    weights, lines = plain
    two = torch.load(double / "parity" / f"{stage}.pt")
    start = load_network(double / "base" / "pipeline" / "unet").state_dict()
    moved = max(float((weights[f"generator.{k}"] - v).abs().max()) for k, v in start.items())
    assert moved > 5e-5  # it trained
    assert support.largest_difference(weights, two) < 1e-6
    other = support.metrics(double / f"parity-{stage}" / "backtrack")
    support.assert_alike(lines, other)


def test_bfloat16_has_the_losses_of_float32(plain, root, world):
    run = support.single(root, "one-bf16", world, *FLAGS, *support.zero("zero1"), "precision=bf16")
    support.backtrack_weights(run)
    mine, theirs = plain[1], support.metrics(run.folder / "backtrack")
    losses = [(a["loss/fake_score"], b["loss/fake_score"]) for a, b in zip(mine, theirs, strict=True)]
    losses = [pair for pair in losses if pair != (None, None)]  # lines of target switches have none
    assert len(losses) == 3 and all(b == pytest.approx(a, rel=0.02) for a, b in losses)


def test_zero3_with_gathered_and_sharded_parameters_in_one_process(plain, root, world):
    """test_elastic has the other stages in one process."""
    run = support.single(root, "alone-zero3", world, *FLAGS, *support.zero("zero3"))
    assert support.largest_difference(plain[0], support.backtrack_weights(run)) < 1e-6
