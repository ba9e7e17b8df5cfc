"""Adapters, GAN term, accumulation, clipping and recomputed activations at once: four processes train what one trains, at ZeRO
2 and 3. The tests with two ranks switch on less, and see more of it."""

import pytest
import support
import torch


@pytest.fixture(scope="module")
def one(root, world, lora_path):
    """One process at ZeRO 0; none of its activations is recomputed."""
    flags = (*support.everything(root, "zero0"), "network.checkpointing=false")
    weights = support.backtrack_weights(support.single(root, "everything-one", world, *flags))
    assert (
        max(float(v.abs().max()) for k, v in weights.items() if ".lora_B." in k and k.startswith("generator.")) > 1e-3
    )
    assert any(k.startswith("fake_score.head.") for k in weights)
    return weights


@pytest.mark.slow
def test_two_nodes_of_two_train_as_one(root, one):
    """Started by torchrun; at ZeRO 3 stopped and resumed."""
    support.torchrun("everything", root, 4)
    for stage in ("zero2", "sharded"):
        assert support.largest_difference(one, torch.load(root / "everything" / f"{stage}-4.pt")) < 1e-5, stage
