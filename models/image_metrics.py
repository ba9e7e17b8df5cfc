"""Metrics between sets of images, from their features: Frechet distance, kernel distance, precision and recall."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """Count, sum and second-moment sum of features in float64. They add up over the parts of a set, so ranks do not
    gather features. stack: all three as one vector [1 + D + D D], for an all-reduce."""

    stack: Tensor
    size: int

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """The moments of features [N, D]."""
        f = features.double()
        count = torch.tensor([float(len(f))], dtype=torch.float64, device=f.device)
        return cls(torch.cat([count, f.sum(0), (f.T @ f).flatten()]), f.shape[1])

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and unbiased covariance [D, D]."""
        count, d = self.stack[0], self.size
        mean = self.stack[1 : 1 + d] / count
        second = self.stack[1 + d :].view(d, d)
        return mean, (second - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """Frechet distance between two Gaussians (Heusel et al. 2017): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.
    """
    (m1, c1), (m2, c2) = one.mean_and_covariance(), other.mean_and_covariance()
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018) between feature sets [N, D]."""
    x, y = one.double(), other.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def precision_recall(fake: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """The share of fake samples inside the real manifold, and of real samples inside the fake one (Kynkaanniemi et al.
    2019). A manifold is the union of balls around each sample up to its k-th neighbour. Feature sets [N, D], [M, D]."""

    def radii(a: Tensor) -> Tensor:
        return torch.cdist(a, a).kthvalue(neighbours + 1, dim=1).values  # the nearest is the sample itself

    between = torch.cdist(fake.double(), real.double())
    precision = (between <= radii(real.double())[None, :]).any(1).double().mean()
    recall = (between <= radii(fake.double())[:, None]).any(0).double().mean()
    return float(precision), float(recall)


def as_floats(images: Tensor) -> Tensor:
    """uint8 images as floats in [-1, 1]."""
    return images.float() / 127.5 - 1


@dataclass(frozen=True)
class PixelComponents:
    """The first principal components of a set of images: features that no classifier has chosen, so that what a classifier
    overlooks still counts. Images above 32 pixels are averaged down to 32 first.

    mean: [P]. directions: orthonormal, [components, P].
    """

    mean: Tensor
    directions: Tensor
    side: ClassVar[int] = 32

    @classmethod
    def fit(cls, images: Tensor, components: int = 32) -> "PixelComponents":
        """The components of images as from `pixels`, [N, P]; fewer than asked for if there are no more."""
        mean = images.mean(0)
        centred = (images - mean).double()
        components = min(components, len(images) - 1, images.shape[1])
        if len(images) < images.shape[1]:  # the smaller of the two products has the same eigenvalues
            rows = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -components:]
            directions = nn.functional.normalize(rows.T @ centred, dim=1)
        else:
            directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -components:].T
        return cls(mean, directions.flip(0).to(images.dtype))

    def to(self, device: torch.device) -> "PixelComponents":
        """The same on a device."""
        return PixelComponents(self.mean.to(device), self.directions.to(device))

    @classmethod
    def pixels(cls, images: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] as rows of float pixels in [-1, 1], [N, P]."""
        images = as_floats(images)
        if images.shape[-1] > cls.side:
            images = nn.functional.adaptive_avg_pool2d(images, cls.side)
        return images.flatten(1)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] to features [N, components]."""
        return self.project(self.pixels(images))

    def project(self, pixels: Tensor) -> Tensor:
        """Rows as from `pixels` to features [N, components]."""
        return (pixels - self.mean) @ self.directions.T


def spread(x0: Tensor) -> Tensor:
    """The standard deviation between samples [B, C, H, W] (within the sample if there is only one), a scalar. It
    becomes small when a generator collapses."""
    if len(x0) > 1:
        return (x0 - x0.roll(1, 0)).square().mean().div(2).sqrt()
    return (x0 - x0.mean((2, 3), keepdim=True)).square().mean().sqrt()
