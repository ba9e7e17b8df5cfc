"""Feature networks: what the scores compare images by. `evaluate.features` chooses one."""

import json
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from models.classifier import DigitClassifier, new_classifier
from trainer.distributed.logs import log
from trainer.distributed.world import barrier
from trainer.errors import UserError
from trainer.training.run import Run

CLASSIFIER_STEPS = 600


class FeatureNetwork(Protocol):
    """name: for metrics.json. classes: whether it also classifies images into the classes of the captions."""

    name: str
    classes: bool

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 images [B, 3, H, W] to features [B, D] and, with `classes`, class logits [B, K]."""


class DigitFeatures:
    """The demo's digit classifier. The first evaluation trains it on the training shards and saves it with its held-out
    accuracy."""

    classes = True

    def __init__(self, run: Run):
        settings = run.settings
        folder = Path(settings.evaluate.classifier) if settings.evaluate.classifier else run.folder / "classifier"
        file = folder / "model.safetensors"
        if run.world.main and not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._train(run, folder)
        barrier(run.world)
        self.network = DigitClassifier.load(file).to(run.world.device)
        accuracy = json.loads((folder / "metrics.json").read_text())["heldout_accuracy"]
        self.name = f"digit classifier, held-out accuracy {accuracy:.4f}"

    def _train(self, run: Run, folder: Path) -> None:
        images, classes = labelled(run, "train")
        network = new_classifier(seed=0)
        network.fit(images, classes, CLASSIFIER_STEPS, seed=0)
        network.eval()
        held, held_classes = labelled(run, "heldout")
        with torch.no_grad():
            accuracy = float((network(held)[1].argmax(1) == held_classes).double().mean())
        about = {"heldout_accuracy": accuracy, "train_images": len(images), "heldout_images": len(held)}
        (folder / "metrics.json").write_text(json.dumps(about) + "\n")
        network.save(folder / "model.safetensors")
        log.info(
            f"evaluate: trained the digit classifier: {100 * accuracy:.2f}% correct on {len(held)} held-out digits"
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(images)


def labelled(run: Run, split: str) -> tuple[Tensor, Tensor]:
    """All images of `data.train` or `data.heldout`, uint8 [N, 3, R, R], and their classes [N]. Reads everything into
    memory."""
    dataset = run.dataset(split, ("image", "caption", "meta"))
    samples = [dataset.read(row) for row in range(len(dataset))]
    if any("class" not in sample["meta"] for sample in samples):
        raise UserError(f'data.{split}: a sample has no "class" in its .json; evaluate.features=digits needs one')
    return to_bytes(torch.stack([s["image"] for s in samples])), torch.tensor([s["meta"]["class"] for s in samples])


def to_bytes(images: Tensor) -> Tensor:
    """Training images [N, 3, R, R] in [-1, 1] as the uint8 images that they were read from."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


FEATURES = {"digits": DigitFeatures}
