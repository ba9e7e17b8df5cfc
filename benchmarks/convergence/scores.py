"""Two independent metrics of a generator: Frechet distances on a classifier's features and on principal components of pixels."""

import torch
from torch import Tensor

from models.classifier import Classifier
from models.image_metrics import Moments, PixelComponents, frechet_distance, precision_recall

METRICS = ("fid", "pixel_fd")


class Scores:
    """Compares uint8 images [N, 3, R, R] with real ones that training did not show."""

    def __init__(self, classifier: Classifier, real: Tensor):
        self.classifier = classifier
        self.components = PixelComponents.fit(PixelComponents.pixels(real))
        self.features = self._features(real)
        self.real = {"fid": Moments.of(self.features), "pixel_fd": Moments.of(self.components(real))}

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier(part)[0] for part in images.split(256)])

    def __call__(self, images: Tensor) -> dict[str, float]:
        features = self._features(images)
        found = {"fid": Moments.of(features), "pixel_fd": Moments.of(self.components(images))}
        distances = {name: frechet_distance(found[name], self.real[name]) for name in METRICS}
        return distances | {"recall": precision_recall(features, self.features)[1]}
