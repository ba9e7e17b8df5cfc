"""A small image classifier, trained on the demo's labelled images: the feature network of the demo's scores."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.errors import ModelError
from models.image_metrics import as_floats


class Classifier(nn.Module):
    """Convolutions, a feature layer, and a linear head per label.

    resolution: side of the images, 8 pixels or a larger power of two. width: size of the feature layer. values: the values
    of each label, such as {"colour": ["pink", "white"]}; a class number is a place in this list.
    """

    def __init__(self, resolution: int, width: int, values: dict[str, list]):
        super().__init__()
        self.about = {"resolution": resolution, "width": width, "values": values}
        layers: list[nn.Module] = []
        channels, side = 3, resolution
        while side > 8:  # strided: full-size convolutions would cost more than all that follows
            layers += [nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.ReLU()]
            channels, side = 32, side // 2
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten()]
        self.body = nn.Sequential(*layers, nn.Linear(64 * (side // 2) ** 2, width), nn.ReLU())
        self.register_buffer("scale", torch.ones(()))
        self.heads = nn.ModuleDict({label: nn.Linear(width, len(found)) for label, found in values.items()})

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 images [N, 3, R, R] to features [N, width], with a root mean square of 1 over the images of `fit`, and the
        class logits [N, K] of each label."""
        features, logits = self._scores(as_floats(images))
        return features / self.scale, logits

    def _scores(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.body(images)
        return features, {label: head(features) for label, head in self.heads.items()}

    def numbers(self, label: str, values: list) -> Tensor:
        """Class numbers [N] of a label's values; -1 for a value that is not known."""
        known = self.about["values"][label]
        return torch.tensor([known.index(value) if value in known else -1 for value in values])

    def fit(self, images: Tensor, labels: dict[str, list], steps: int, seed: int) -> None:
        """Trains on uint8 images [N, 3, R, R] and the N values of each label, with AdamW, a cosine schedule, noise and
        one-pixel shifts. The result is a function of the arguments."""
        rng = torch.Generator().manual_seed(seed)
        adam = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01)
        truth = {label: self.numbers(label, values) for label, values in labels.items()}
        for step in range(steps):
            rows = torch.randint(len(images), (128,), generator=rng)
            shift = torch.randint(-1, 2, (2,), generator=rng).tolist() if step % 2 else (0, 0)
            batch = torch.roll(as_floats(images[rows]), tuple(shift), (2, 3))
            batch = batch + 0.1 * torch.randn(batch.shape, generator=rng)
            adam.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
            logits = self._scores(batch)[1]
            loss = sum(nn.functional.cross_entropy(logits[label], truth[label][rows]) for label in truth)
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            self.scale.copy_(
                torch.cat([self._scores(as_floats(part))[0] for part in images.split(256)]).square().mean().sqrt()
            )

    def save(self, file: Path) -> None:
        save_file(self.state_dict(), file, {"about": json.dumps(self.about)})

    @classmethod
    def load(cls, file: Path) -> "Classifier":
        """Raises ModelError for a file that `save` did not write."""
        try:
            with safe_open(file, "pt") as opened:
                model = cls(**json.loads((opened.metadata() or {})["about"]))
            model.load_state_dict(load_file(file))  # strict
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ModelError(f"{file}: is damaged, or of an earlier version: remove it to train another") from error
        return model.eval().requires_grad_(False)


def new_classifier(resolution: int, width: int, values: dict[str, list], seed: int) -> Classifier:
    """An untrained classifier. Does not touch the global random generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(resolution, width, values)
