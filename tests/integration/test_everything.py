"""Adapters, GAN term, accumulation, clipping and recomputed activations at once: as many processes as you like train what
one trains, at every ZeRO stage."""

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
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one(root, one, ranks):
    support.ranks("everything", root, ranks)
    for stage in support.STAGES:
        weights = torch.load(root / "everything" / f"{stage}-{ranks}.pt")
        assert support.largest_difference(one, weights) < 1e-5, stage
