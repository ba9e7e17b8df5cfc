"""The demo's classifier, whose labels `evaluate.features` chooses: its features, and how many images are what their
captions ask for."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.shard_dataset import ShardDataset
from models.classifier import Classifier, new_classifier
from trainer.distributed.logs import log
from trainer.distributed.world import barrier
from trainer.errors import UserError
from trainer.training.run import Run

CLASSIFIER_STEPS = 600


@dataclass(frozen=True)
class Labels:
    """What the demo's classifier learns. keys: the labels' names in accuracies ("class", "colour"), and the key in a sample's
    .json that has the truth. width: of its features."""

    keys: dict[str, str]
    width: int


LABELS = {
    "digits": Labels({"class": "class"}, width=32),
    "emoji": Labels({"class": "object", "colour": "colour"}, width=64),
}


class DemoClassifier:
    """The demo's classifier. The first evaluation trains it on the labelled training shards and saves it with its
    accuracies on the held-out ones."""

    def __init__(self, run: Run):
        settings = run.settings
        chosen = LABELS[settings.evaluate.features]
        self.labels = chosen.keys
        folder = Path(settings.evaluate.classifier) if settings.evaluate.classifier else run.folder / "classifier"
        file = folder / "model.safetensors"
        if run.world.main and not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._train(run, folder, file, chosen.width)
        barrier(run.world)
        self.file = file
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
        accuracy = as_shares(self.correct(list(held), truth), accuracy_names(self.labels))
        about = {"heldout_accuracy": accuracy, "train_images": len(images), "heldout_images": len(held)}
        (folder / "metrics.json").write_text(json.dumps(about) + "\n")
        network.save(folder / "model.tmp")
        (folder / "model.tmp").replace(file)
        log.info(f"evaluate: trained the classifier: {_shown(accuracy)} on {len(held)} held-out images")

    @torch.no_grad()
    def features(self, images: list[Tensor]) -> Tensor:
        """Features [B, D] of uint8 images [3, R, R]."""
        return self.network(self._stacked(images))[0]

    @torch.no_grad()
    def correct(self, images: list[Tensor], metas: list[dict]) -> Tensor:
        """Whether images are what their .json says, [B, 2 labels], as `accuracy_names` orders it: 1 or 0, and NaN where an
        image does not count: half of the columns are of combinations that training shows, the others of those that it does
        not."""
        logits = self.network(self._stacked(images))[1]
        return correctness(
            {key: scores.argmax(1).cpu() for key, scores in logits.items()}, metas, self.network, self.labels
        )

    def _stacked(self, images: list[Tensor]) -> Tensor:
        return torch.stack(list(images)).to(next(self.network.parameters()).device)


def labelled(run: Run, split: str, labels: dict[str, str]) -> tuple[Tensor, list[dict]]:
    """All images of a split of the data, uint8 [N, 3, R, R], and their .json, which must have the keys of
    `labels`. Reads everything into memory."""
    dataset = run.dataset(split, ("image", "caption", "meta"))
    if type(dataset) is not ShardDataset:
        raise UserError(
            f"data.{split}: the demo's classifier learns from shards on a disk, without data.weights: name some in data.labelled"
        )
    samples = [dataset.read(row) for row in range(len(dataset))]
    for key in labels.values():
        if any(key not in sample["meta"] for sample in samples):
            raise UserError(
                f'data.{split}: a sample has no "{key}" in its .json, which evaluate.features='
                f"{run.settings.evaluate.features} needs"
            )
    return to_bytes(torch.stack([sample["image"] for sample in samples])), [sample["meta"] for sample in samples]


def correctness(found: dict[str, Tensor], metas: list[dict], network: Classifier, labels: dict[str, str]) -> Tensor:
    """As `DemoClassifier.correct`, from the class numbers [B] that were found for each key."""
    heldout = torch.tensor([bool(meta.get("heldout")) for meta in metas])
    columns = []
    for counts in (~heldout, heldout):
        for key in labels.values():
            right = (found[key] == network.numbers(key, [meta.get(key) for meta in metas])).float()
            columns.append(torch.where(counts, right, torch.nan))
    return torch.stack(columns, dim=1)


def accuracy_names(labels: dict[str, str]) -> list[str]:
    """The metrics of `correctness`'s columns."""
    return [f"{part}{label}_accuracy" for part in ("", "heldout_") for label in labels]


def as_shares(correct: Tensor, names: list[str]) -> dict[str, float]:
    """Accuracies from rows as of `correctness`; without those that no image counts for."""
    means = correct.double().nanmean(0).tolist()
    return {name: mean for name, mean in zip(names, means, strict=True) if mean == mean}


def _shown(accuracy: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in accuracy.items())


def to_bytes(images: Tensor) -> Tensor:
    """Training images [N, 3, R, R] in [-1, 1] as the uint8 images that they were read from."""
    return ((images + 1) * 127.5).round().to(torch.uint8)
