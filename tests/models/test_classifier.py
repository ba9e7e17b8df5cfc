"""The demo's classifier: any size of image, any labels, exact saving, the same training twice."""

import pytest
import torch

from models.classifier import Classifier, new_classifier


def coloured(side: int) -> tuple[torch.Tensor, dict[str, list]]:
    """Images of one colour with a bright or dark half, and these two labels."""
    rng = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 3, (240,), generator=rng)
    half = torch.randint(0, 2, (240,), generator=rng)
    images = torch.full((240, 3, side, side), 20)
    images[torch.arange(240), colour] = 200
    images[half == 0, :, :, : side // 2] += 50
    images[half == 1, :, :, side // 2 :] += 50
    return images.to(torch.uint8), {"colour": [["red", "green", "blue"][c] for c in colour], "side": half.tolist()}


@pytest.mark.parametrize("side", [8, 32])
def test_learns_every_label_and_is_saved(side, tmp_path):
    images, labels = coloured(side)
    values = {"colour": ["blue", "green", "red"], "side": [0, 1]}
    state = torch.get_rng_state()
    network = new_classifier(side, 16, values, seed=0)
    network.fit(images[:200], {key: found[:200] for key, found in labels.items()}, steps=120, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    network.save(tmp_path / "model.safetensors")
    loaded = Classifier.load(tmp_path / "model.safetensors")
    features, logits = loaded(images)
    assert features.shape == (240, 16) and {key: found.shape[1] for key, found in logits.items()} == {
        "colour": 3,
        "side": 2,
    }
    assert features[:200].square().mean().item() == pytest.approx(1, rel=1e-4)  # so that distances have one scale
    for key, scores in logits.items():
        truth = loaded.numbers(key, labels[key])
        assert (scores.argmax(1) == truth)[200:].float().mean() > 0.95, key


def test_training_is_a_function_of_its_arguments():
    images, labels = coloured(8)
    values = {key: sorted(set(found)) for key, found in labels.items()}
    one, two = (new_classifier(8, 16, values, seed=0) for _ in range(2))
    for network in (one, two):
        network.fit(images, labels, steps=3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_an_unknown_value_is_never_right():
    assert new_classifier(8, 4, {"colour": ["pink", "white"]}, 0).numbers("colour", ["white", "black"]).tolist() == [
        1,
        -1,
    ]
