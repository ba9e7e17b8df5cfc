"""What evaluation looks through: a feature network over uint8 images, chosen by `evaluate.features`."""

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


class Judge(Protocol):
    """name: for metrics.json. classes: whether logits of the captions' classes come with the features."""

    name: str
    classes: bool

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 images [B, 3, H, W] to features [B, D] and, if `classes`, logits [B, K]."""


class DigitJudge:
    """The demo's classifier: trained once on the training shards, kept with its held-out accuracy."""

    classes = True

    def __init__(self, run: Run):
        settings = run.settings
        folder = Path(settings.evaluate.classifier) if settings.evaluate.classifier else run.folder / "classifier"
        file = folder / "model.safetensors"
        if run.world.main and not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._train(run, folder)
        barrier(run.world)
        self.net = DigitClassifier.load(file).to(run.world.device)
        self.accuracy = json.loads((folder / "metrics.json").read_text())["heldout_accuracy"]
        self.name = f"digit classifier, held-out accuracy {self.accuracy:.4f}"

    def _train(self, run: Run, folder: Path) -> None:
        images, classes = labelled(run, "train")
        net = new_classifier(seed=0)
        net.fit(images, classes, CLASSIFIER_STEPS, seed=0)
        net.eval()
        held, held_classes = labelled(run, "heldout")
        with torch.no_grad():
            accuracy = float((net(held)[1].argmax(1) == held_classes).double().mean())
        (folder / "metrics.json").write_text(
            json.dumps({"heldout_accuracy": accuracy, "train_images": len(images), "heldout_images": len(held)}) + "\n"
        )
        net.save(folder / "model.safetensors")
        log.info(f"evaluate: trained the digit classifier: {100 * accuracy:.2f}% of {len(held)} held-out digits")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(images)


def labelled(run: Run, split: str) -> tuple[Tensor, Tensor]:
    """All images of `data.train` or `data.heldout`, uint8 [N, 3, R, R], and their classes [N]. For data sets that fit
    in memory."""
    dataset = run.dataset(split, ("image", "caption", "meta"))
    samples = []
    for row in range(len(dataset)):
        samples.append(dataset.read(row))
        if "class" not in samples[-1]["meta"]:
            raise UserError(f'data.{split}: a sample has no "class" in its .json; evaluate.features=digits needs one')
    return to_bytes(torch.stack([s["image"] for s in samples])), torch.tensor([s["meta"]["class"] for s in samples])


def to_bytes(images: Tensor) -> Tensor:
    """Training images [N, 3, R, R] in [-1, 1] back to the uint8 that they were read from."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


JUDGES = {"digits": DigitJudge}
