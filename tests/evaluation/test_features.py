"""Accuracies of generated images, by what their captions asked for."""

import pytest
import torch

from trainer.evaluation.features import as_shares, count_correct


class TwoLabels:
    """Knows three things and two colours."""

    def __init__(self):
        self.name, self.labels = "two labels", {"class": "object", "colour": "colour"}
        self.values = {"object": ["cat", "dog", "sun"], "colour": ["pink", "white"]}

    def numbers(self, key, values):
        return torch.tensor([self.values[key].index(v) if v in self.values[key] else -1 for v in values])


def test_combinations_that_training_did_not_show_count_apart():
    metas = [
        {"object": "cat", "colour": "pink", "heldout": False},
        {"object": "dog", "colour": "pink"},
        {"object": "sun", "colour": "white", "heldout": False},
        {"object": "sun", "colour": "pink", "heldout": True},
        {"object": "moon", "colour": "white", "heldout": True},
    ]
    found = {"object": torch.tensor([0, 1, 1, 2, 2]), "colour": torch.tensor([0, 1, 0, 0, 1])}
    assert as_shares(count_correct(TwoLabels(), found, metas)) == {
        "class_accuracy": pytest.approx(2 / 3),
        "colour_accuracy": pytest.approx(1 / 3),
        "heldout_class_accuracy": 0.5,  # an object that the classifier does not know is never right
        "heldout_colour_accuracy": 1.0,
    }
    # A rank without images adds nothing, and its counts add up with those of the others.
    none = count_correct(TwoLabels(), {key: values[:0] for key, values in found.items()}, [])
    assert all(counts.tolist() == [0, 0] for counts in none.values()) and as_shares(none) == {}


def test_without_held_out_combinations():
    found = {"object": torch.tensor([0]), "colour": torch.tensor([0])}
    shares = as_shares(count_correct(TwoLabels(), found, [{"object": "cat", "colour": "white"}]))
    assert shares == {"class_accuracy": 1.0, "colour_accuracy": 0.0}
