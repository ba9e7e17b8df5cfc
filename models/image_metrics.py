"""Metrics between sets of images, from their features: Frechet distance, kernel distances, precision and recall.

Feature sets are tensors, or NumPy arrays and memory maps, of which no more is read than needed. All sums are float64: the
settings of TF32 do not reach them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import ModelError

Features = Tensor | np.ndarray
ALL = slice(None)
KID_SEED = 2020  # torch-fidelity's default `rng_seed`


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of features, in float64, of a set whose size is not known: a reference file."""

    mean: Tensor
    covariance: Tensor

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.covariance


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

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets together."""
        return Moments(self.stack + other.stack, self.size)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and unbiased covariance [D, D]. Raises ModelError for fewer than two images."""
        count, d = self.stack[0], self.size
        if count < 2:
            raise ModelError(f"a covariance needs at least 2 images, not {int(count)}: evaluate more images")
        mean = self.stack[1 : 1 + d] / count
        second = self.stack[1 + d :].view(d, d)
        return mean, (second - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(one: Moments | Statistics, other: Moments | Statistics) -> float:
    """Frechet distance between two Gaussians (Heusel et al. 2017): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric, so
    that singular covariances (fewer images than features) need no offset. Raises ModelError for statistics of another
    number of features, and for fewer than two images.
    """
    (m1, c1), (m2, c2) = one.mean_and_covariance(), other.mean_and_covariance()
    if len(m1) != len(m2):
        raise ModelError(
            f"statistics of {len(m1)} features cannot be compared with {len(m2)}: use a reference of the same network"
        )
    m2, c2 = m2.to(m1.device), c2.to(m1.device)
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def kernel_distances(
    fake: Features,
    real: Features,
    which: Iterable[int] | None = None,
    subsets: int = 100,
    size: int = 1000,
    device: torch.device | None = None,
) -> Tensor:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018) of random subsets of feature sets
    [N, D], [M, D]: float64 [subsets] on the CPU. Subsets have min(size, N, M) rows, drawn without replacement.

    The draws are those of torch-fidelity (`metric_kid.py`, fake as its first input), so that equal features give equal
    distances. which: compute these subset numbers only, in this order (ranks share them); default all. device: where to
    compute (default: where the features are). Raises ModelError for fewer than two images.
    """
    size = min(size, len(fake), len(real))
    if size < 2:
        raise ModelError(f"a kernel distance needs at least 2 images per set, not {size}: evaluate more images")
    which = range(subsets) if which is None else list(which)
    draws = np.random.RandomState(KID_SEED)
    drawn = [[draws.choice(len(each), size, replace=False) for each in (fake, real)] for _ in range(subsets)]
    found = []
    for number in which:
        x, y = (_doubles(each[rows], device) for each, rows in zip((fake, real), drawn[number], strict=True))
        found.append(_within(x) + _within(y) - 2 * _cubic(x, y).mean())
    return torch.stack(found).cpu() if found else torch.empty(0, dtype=torch.float64)


def kernel_distance(fake: Features, real: Features, subsets: int = 100, size: int = 1000) -> float:
    """Kernel distance (KID): the mean of `kernel_distances`."""
    return float(kernel_distances(fake, real, None, subsets, size).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    k = x @ y.T / x.shape[1] + 1
    return k * k * k


def _within(x: Tensor) -> Tensor:
    k = _cubic(x, x)
    return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))


def radii(
    features: Features, rows: slice = ALL, neighbours: int = 3, chunk: int = 1000, device: torch.device | None = None
) -> Tensor:
    """Distance of samples to their k-th nearest neighbour among all features [N, D]: float64 [rows].

    rows: only of these samples (ranks share them). Memory: the features as float64, and chunk x N distances. Raises
    ModelError if there are no more than `neighbours` samples.
    """
    if len(features) <= neighbours:
        raise ModelError(
            f"precision and recall need more than {neighbours} images per set, not {len(features)}: evaluate more images"
        )
    centres = _doubles(features[ALL], device)
    found = [centres.new_empty(0)]
    for points in _pieces(features, rows, chunk, device):
        nearest = _squared_distances(points, centres).topk(neighbours + 1, dim=1, largest=False).values
        found.append(nearest[:, -1].sqrt())  # the nearest of all is the sample itself
    return torch.cat(found)


def inside(
    points: Features,
    centres: Features,
    radius: Tensor,
    rows: slice = ALL,
    chunk: int = 1000,
    device: torch.device | None = None,
) -> Tensor:
    """Whether points [N, D] lie in the ball of any centre [M, D], which has its own radius [M]: bool [rows].

    rows and memory: as of `radii`.
    """
    centres = _doubles(centres[ALL], device)
    radius = radius.to(centres.device)
    found = [radius.new_empty(0, dtype=torch.bool)]
    for piece in _pieces(points, rows, chunk, device):
        found.append((_squared_distances(piece, centres).sqrt() <= radius).any(1))
    return torch.cat(found)


def precision_recall(
    fake: Features, real: Features, neighbours: int = 3, chunk: int = 1000, device: torch.device | None = None
) -> tuple[float, float]:
    """The share of fake samples inside the real manifold, and of real samples inside the fake one (Kynkaanniemi et al.
    2019). A manifold is the union of balls around each sample up to its k-th neighbour, as in torch-fidelity. Feature
    sets [N, D], [M, D]. Raises ModelError as `radii` does."""
    options = {"chunk": chunk, "device": device}
    precision = inside(fake, real, radii(real, ALL, neighbours, **options), **options)
    recall = inside(real, fake, radii(fake, ALL, neighbours, **options), **options)
    return float(precision.double().mean()), float(recall.double().mean())


def gaussian_kernel_sums(
    x: Features,
    y: Features,
    sigma: float = 10.0,
    rows_x: slice = ALL,
    rows_y: slice = ALL,
    chunk: int = 1000,
    device: torch.device | None = None,
) -> Tensor:
    """Sums of the kernel exp(-|a - b|^2 / (2 sigma^2)) over the pairs of x and x, y and y, x and y: float64 [3].

    rows_x, rows_y: the rows that each pair begins with; sums over disjoint rows add up, so ranks share them. Memory: as
    of `radii`.
    """
    all_x, all_y = _doubles(x[ALL], device), _doubles(y[ALL], device)
    sums = all_x.new_zeros(3)

    def total(points: Tensor, centres: Tensor) -> Tensor:
        return _squared_distances(points, centres).div_(-2 * sigma**2).exp_().sum()

    for points in _pieces(x, rows_x, chunk, device):
        sums[0] += total(points, all_x)
        sums[2] += total(points, all_y)
    for points in _pieces(y, rows_y, chunk, device):
        sums[1] += total(points, all_y)
    return sums


def discrepancy(sums: Tensor, n: int, m: int) -> float:
    """1000 times the biased squared MMD (diagonals included) from the kernel sums of sets of n and m samples."""
    return 1000 * float(sums[0] / n**2 + sums[1] / m**2 - 2 * sums[2] / (n * m))


def maximum_mean_discrepancy(x: Features, y: Features, sigma: float = 10.0, chunk: int = 1000) -> float:
    """CMMD (Jayasumana et al. 2024) between CLIP embeddings [N, D], [M, D] of length 1: 1000 times the biased squared
    MMD with a Gaussian kernel."""
    return discrepancy(gaussian_kernel_sums(x, y, sigma, chunk=chunk), len(x), len(y))


def _doubles(part: Features, device: torch.device | None) -> Tensor:
    """Rows as float64. An array is copied: a read-only memory map cannot become a tensor."""
    tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
    return tensor.to(device, torch.float64)


def _pieces(features: Features, rows: slice, chunk: int, device: torch.device | None) -> Iterator[Tensor]:
    start, stop, _ = rows.indices(len(features))
    for first in range(start, stop, chunk):
        yield _doubles(features[first : min(first + chunk, stop)], device)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|a - b|^2 of each row of x [N, D] and of y [M, D]: [N, M]; not below 0."""
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)[None, :]
    return lengths.addmm_(x, y.T, alpha=-2).clamp_min_(0)


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
