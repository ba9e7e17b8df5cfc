"""Images of 16x16 pixels for the pixel-space problems: (to train on, their labels, to compare with)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.convergence.sigma import SIDE
from data.shard_dataset import ShardDataset
from data.shard_patterns import expand
from trainer.config.schema import RunSettings
from trainer.evaluation.classifier import to_bytes


def _halved(images: Tensor) -> Tensor:
    return avg_pool2d(images.float(), 2).round().to(torch.uint8)


def photographs() -> tuple[Tensor, list, Tensor]:
    """Patches of scikit-learn's two photographs at half size; labels: photograph and third of its width."""
    from sklearn.datasets import load_sample_images

    rng, found, labels = np.random.default_rng(0), [], []
    for number, photo in enumerate(load_sample_images().images):
        half = _halved(torch.from_numpy(photo.copy()).permute(2, 0, 1))
        for _ in range(2048):
            top, left = (int(rng.integers(size - SIDE + 1)) for size in half.shape[1:])
            found.append(half[:, top : top + SIDE, left : left + SIDE])
            labels.append(f"{number}-{3 * left // half.shape[2]}")
    images = torch.stack(found)
    held = torch.arange(len(images)) % 4 == 3
    return images[~held], [label for label, out in zip(labels, held.tolist(), strict=True) if not out], images[held]


def emoji(settings: RunSettings) -> tuple[Tensor, list, Tensor]:
    """The emoji demo's images at half size; labels: the objects."""

    def read(patterns: str | list[str]) -> tuple[Tensor, list]:
        data = ShardDataset(expand(patterns), settings.data.resolution, ("image", "meta"), **settings.data.keys)
        samples = [data.read(row) for row in range(len(data))]
        images = to_bytes(torch.stack([sample["image"] for sample in samples]))
        return _halved(images), [sample["meta"]["object"] for sample in samples]

    return *read(settings.data.train), read(settings.data.heldout)[0]
