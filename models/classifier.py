"""A small classifier of handwritten digits, trained on the real ones: the feature extractor of the digit demo."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class DigitClassifier(nn.Module):
    """Three convolutions and a 32-dimensional feature layer, for 8x8 images."""

    features = 32

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, self.features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.features, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images [N, 3, 8, 8] to features [N, 32] and class logits [N, 10]."""
        return self._scores(images.float() / 127.5 - 1)

    def _scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return features, self.head(features)

    def fit(self, images: Tensor, classes: Tensor, steps: int, seed: int) -> None:
        """Trains on uint8 images [N, 3, 8, 8] with classes [N], with AdamW, a cosine schedule, noise and one-pixel
        shifts. The result is a function of the arguments."""
        rng = torch.Generator().manual_seed(seed)
        adam = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01)
        clean = images.float() / 127.5 - 1
        for step in range(steps):
            rows = torch.randint(len(clean), (128,), generator=rng)
            shift = torch.randint(-1, 2, (2,), generator=rng).tolist() if step % 2 else (0, 0)
            batch = torch.roll(clean[rows], tuple(shift), (2, 3))
            batch = batch + 0.1 * torch.randn(batch.shape, generator=rng)
            adam.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = nn.functional.cross_entropy(self._scores(batch)[1], classes[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()

    def save(self, file: Path) -> None:
        save_file(self.state_dict(), file)

    @classmethod
    def load(cls, file: Path) -> "DigitClassifier":
        model = cls()
        model.load_state_dict(load_file(file))  # strict
        return model.eval().requires_grad_(False)


def new_classifier(seed: int) -> DigitClassifier:
    """An untrained classifier. Does not touch the global random generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitClassifier()
