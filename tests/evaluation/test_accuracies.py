"""Accuracies of generated images, by what their captions asked for."""

import pytest
import torch

from models.classifier import new_classifier
from trainer.evaluation.classifier import accuracy_names, as_shares, correctness

LABELS = {"class": "object", "colour": "colour"}
VALUES = {"object": ["cat", "dog", "sun"], "colour": ["pink", "white"]}


def shares(found: dict[str, torch.Tensor], metas: list[dict]) -> dict[str, float]:
    network = new_classifier(8, 4, VALUES, seed=0)
    return as_shares(correctness(found, metas, network, LABELS), accuracy_names(LABELS))


def test_combinations_that_training_did_not_show_count_apart():
    metas = [
        {"object": "cat", "colour": "pink", "heldout": False},
        {"object": "dog", "colour": "pink"},
        {"object": "sun", "colour": "white", "heldout": False},
        {"object": "sun", "colour": "pink", "heldout": True},
        {"object": "moon", "colour": "white", "heldout": True},
    ]
    found = {"object": torch.tensor([0, 1, 1, 2, 2]), "colour": torch.tensor([0, 1, 0, 0, 1])}
    assert shares(found, metas) == {
        "class_accuracy": pytest.approx(2 / 3),
        "colour_accuracy": pytest.approx(1 / 3),
        "heldout_class_accuracy": 0.5,  # an object that the classifier does not know is never right
        "heldout_colour_accuracy": 1.0,
    }


def test_without_held_out_combinations():
    found = {"object": torch.tensor([0]), "colour": torch.tensor([0])}
    assert shares(found, [{"object": "cat", "colour": "white"}]) == {"class_accuracy": 1.0, "colour_accuracy": 0.0}
