"""Feature networks: what the scores compare images by. So far a classifier, whose labels `evaluate.features` chooses."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from models.classifier import Classifier, new_classifier
from trainer.distributed.logs import log
from trainer.distributed.world import barrier
from trainer.errors import UserError
from trainer.training.run import Run

CLASSIFIER_STEPS = 600


class FeatureNetwork(Protocol):
    """name: for metrics.json. labels: which "class" and "colour" accuracies it gives, and the key in a sample's .json that
    has the truth; empty for a network that does not classify."""

    name: str
    labels: dict[str, str]

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 images [B, 3, H, W] to features [B, D] and, for each key of `labels`, the class numbers [B]."""

    def numbers(self, key: str, values: list) -> Tensor:
        """The class numbers [B] of a key's values."""


@dataclass(frozen=True)
class Labels:
    """What the demo's classifier learns. keys: as `FeatureNetwork.labels`. width: of its features."""

    keys: dict[str, str]
    width: int


FEATURES = {
    "digits": Labels({"class": "class"}, width=32),
    "emoji": Labels({"class": "object", "colour": "colour"}, width=64),
}


class ClassifierFeatures:
    """The demo's classifier. The first evaluation trains it on the labelled training shards and saves it with its
    accuracies on the held-out ones."""

    def __init__(self, run: Run):
        settings = run.settings
        chosen = FEATURES[settings.evaluate.features]
        self.labels = chosen.keys
        folder = Path(settings.evaluate.classifier) if settings.evaluate.classifier else run.folder / "classifier"
        file = folder / "model.safetensors"
        if run.world.main and not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._train(run, folder, file, chosen.width)
        barrier(run.world)
        self.network = Classifier.load(file).to(run.world.device)
        known = self.network.about
        if set(known["values"]) != set(self.labels.values()) or known["resolution"] != settings.data.resolution:
            raise UserError(
                f"{file} knows {', '.join(known['values'])} at {known['resolution']} pixels, not "
                f"{', '.join(self.labels.values())} at {settings.data.resolution}: name another folder with "
                "evaluate.classifier, or remove it to train another"
            )
        accuracy = json.loads((folder / "metrics.json").read_text())["heldout_accuracy"]
        self.name = f"{settings.evaluate.features} classifier ({_shown(accuracy)} on real held-out images)"

    def _train(self, run: Run, folder: Path, file: Path, width: int) -> None:
        images, metas = labelled(run, "labelled" if run.settings.data.labelled else "train", self.labels)
        labels = {key: [meta[key] for meta in metas] for key in self.labels.values()}
        values = {key: sorted(set(found)) for key, found in labels.items()}
        network = new_classifier(run.settings.data.resolution, width, values, seed=0)
        network.fit(images, labels, CLASSIFIER_STEPS, seed=0)
        network.eval()
        held, truth = labelled(run, "heldout", self.labels)
        self.network = network
        accuracy = as_shares(count_correct(self, self(held)[1], truth))
        about = {"heldout_accuracy": accuracy, "train_images": len(images), "heldout_images": len(held)}
        (folder / "metrics.json").write_text(json.dumps(about) + "\n")
        network.save(folder / "model.tmp")
        (folder / "model.tmp").replace(file)
        log.info(f"evaluate: trained the classifier: {_shown(accuracy)} on {len(held)} held-out images")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features, logits = self.network(images)
        return features, {key: scores.argmax(1) for key, scores in logits.items()}

    def numbers(self, key: str, values: list) -> Tensor:
        return self.network.numbers(key, values)


def labelled(run: Run, split: str, labels: dict[str, str]) -> tuple[Tensor, list[dict]]:
    """All images of a split of the data, uint8 [N, 3, R, R], and their .json, which must have the keys of
    `labels`. Reads everything into memory."""
    dataset = run.dataset(split, ("image", "caption", "meta"))
    samples = [dataset.read(row) for row in range(len(dataset))]
    for key in labels.values():
        if any(key not in sample["meta"] for sample in samples):
            raise UserError(
                f'data.{split}: a sample has no "{key}" in its .json, which evaluate.features='
                f"{run.settings.evaluate.features} needs"
            )
    return to_bytes(torch.stack([sample["image"] for sample in samples])), [sample["meta"] for sample in samples]


def count_correct(network: FeatureNetwork, found: dict[str, Tensor], metas: list[dict]) -> dict[str, Tensor]:
    """How many images have the labels of their .json, and how many there are, [2] in float64, by accuracy: of each label,
    for combinations that training shows ("class_accuracy") and those that it does not ("heldout_class_accuracy")."""
    counts = {}
    for part, heldout in (("", False), ("heldout_", True)):
        rows = [row for row, meta in enumerate(metas) if bool(meta.get("heldout")) is heldout]
        for label, key in network.labels.items():
            truth = network.numbers(key, [metas[row].get(key) for row in rows])
            right = (found[key].cpu()[rows] == truth).double().sum()
            counts[f"{part}{label}_accuracy"] = torch.stack([right, torch.tensor(float(len(rows))).double()])
    return counts


def as_shares(counts: dict[str, Tensor]) -> dict[str, float]:
    """Accuracies from counts; without those that nothing was counted for."""
    return {name: float(right / total) for name, (right, total) in counts.items() if total > 0}


def _shown(accuracy: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in accuracy.items())


def to_bytes(images: Tensor) -> Tensor:
    """Training images [N, 3, R, R] in [-1, 1] as the uint8 images that they were read from."""
    return ((images + 1) * 127.5).round().to(torch.uint8)
