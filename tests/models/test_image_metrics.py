"""Metrics of feature sets, compared with the packages whose numbers papers report."""

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as cleanfid_distance
from pytorch_fid.fid_score import calculate_frechet_distance as pytorch_fid_distance
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from models.errors import ModelError
from models.image_metrics import (
    Moments,
    PixelComponents,
    Statistics,
    discrepancy,
    frechet_distance,
    gaussian_kernel_sums,
    inside,
    kernel_distance,
    kernel_distances,
    maximum_mean_discrepancy,
    precision_recall,
    radii,
)


def feature_sets(
    n: int, m: int, size: int = 64, seed: int = 0, scale: float = 1.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets that differ a little, correlated and not negative as Inception's features are: float32 [n, size],
    [m, size]."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=rng) / size**0.5
    fake = (scale * torch.randn(n, size, generator=rng) @ mix).relu()
    return fake, (torch.randn(m, size, generator=rng) @ mix + 0.05).relu()


def statistics(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    rows = features.double().numpy()
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_frechet_distance_of_known_gaussians():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 3, generator=rng)
    b = torch.randn(20000, 3, generator=rng) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0.0, 0.0])
    # |m|^2 + sum (s1 - s2)^2 for diagonal covariances
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(1 + 0 + 1 + 4, rel=0.03)
    assert frechet_distance(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(500, 700), (40, 30), (500, 30)])
def test_frechet_distance_is_that_of_other_packages(n, m):
    """Also of fewer images than the 64 features, where covariances are singular."""
    fake, real = feature_sets(n, m)
    ours = frechet_distance(Moments.of(fake), Moments.of(real))
    assert ours > 0.1
    (m1, c1), (m2, c2) = statistics(fake), statistics(real)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(fake.double()), fid_features_to_statistics(real.double()), False
    )["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)
    assert ours == pytest.approx(cleanfid_distance(m1, c1, m2, c2), abs=1e-4, rel=1e-4)
    assert ours == pytest.approx(pytorch_fid_distance(m1, c1, m2, c2), abs=1e-4, rel=1e-4)


def test_moments_add_up_and_compare_with_statistics_of_a_file():
    fake, real = feature_sets(300, 200)
    whole = frechet_distance(Moments.of(fake), Moments.of(real))
    parts = Moments.of(fake[:100]) + Moments.of(fake[100:])
    assert frechet_distance(parts, Moments.of(real)) == pytest.approx(whole, rel=1e-9)
    known = Statistics(*(torch.from_numpy(part) for part in statistics(real)))
    assert frechet_distance(parts, known) == pytest.approx(whole, rel=1e-9)
    assert frechet_distance(known, parts) == pytest.approx(whole, rel=1e-9)


def test_frechet_distance_that_is_not_defined():
    fake, real = feature_sets(10, 10)
    with pytest.raises(ModelError, match="at least 2 images, not 1"):
        frechet_distance(Moments.of(fake[:1]), Moments.of(real))
    with pytest.raises(ModelError, match="64 features cannot be compared with 32"):
        frechet_distance(Moments.of(fake), Moments.of(real[:, :32]))


def test_kernel_distance_is_torch_fidelitys():
    fake, real = feature_sets(260, 330)
    theirs = kid_features_to_metric(fake.double(), real.double(), kid_subsets=20, kid_subset_size=200, verbose=False)
    found = kernel_distances(fake, real, None, 20, 200)
    assert float(found.mean()) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert float(found.std(correction=0)) == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)
    assert kernel_distance(fake, real, 20, 200) == float(found.mean())
    single = kid_features_to_metric(fake, real, kid_subsets=20, kid_subset_size=200, verbose=False)
    assert float(found.mean()) == pytest.approx(single["kernel_inception_distance_mean"], rel=1e-3)


def test_default_kernel_distance_is_torch_fidelitys_default():
    fake, real = feature_sets(1010, 1100, 8)
    theirs = kid_features_to_metric(fake.double(), real.double(), verbose=False)
    assert kernel_distance(fake, real) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_subsets_of_a_kernel_distance_can_be_shared(tmp_path):
    """Each rank computes some subsets; small sets make small subsets; a read-only memory map is read as a tensor is."""
    fake, real = feature_sets(60, 45)
    whole = kernel_distances(fake, real, None, 7)
    theirs = kid_features_to_metric(fake.double(), real.double(), kid_subsets=7, kid_subset_size=45, verbose=False)
    assert float(whole.mean()) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    shares = torch.cat([kernel_distances(fake, real, range(first, 7, 2), 7) for first in (0, 1)])
    assert torch.equal(shares, whole[[0, 2, 4, 6, 1, 3, 5]])
    assert kernel_distances(fake, real, []).shape == (0,)
    np.save(tmp_path / "fake.npy", fake.numpy())
    mapped = np.load(tmp_path / "fake.npy", mmap_mode="r")
    assert torch.equal(kernel_distances(mapped, real.numpy(), None, 7), whole)
    with pytest.raises(ModelError, match="at least 2 images"):
        kernel_distance(fake[:1], real)


@pytest.mark.parametrize("size", [64, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_precision_and_recall_are_torch_fidelitys(size, seed):
    fake, real = feature_sets(400, 500, size, seed)
    theirs = prc_features_to_metric(fake, real, verbose=False)
    precision, recall = precision_recall(fake, real)
    # Whole counts: torch-fidelity averages in float32.
    assert round(400 * precision) == round(400 * theirs["precision"]) and 0 < precision < 1
    assert round(500 * recall) == round(500 * theirs["recall"]) and 0 < recall < 1
    assert precision != recall


def test_precision_and_recall_in_chunks_and_shares(tmp_path):
    fake, real = feature_sets(101, 73)
    whole = precision_recall(fake, real)
    assert precision_recall(fake, real, chunk=7) == whole
    np.save(tmp_path / "real.npy", real.numpy())
    mapped = np.load(tmp_path / "real.npy", mmap_mode="r")
    assert precision_recall(fake.numpy(), mapped, chunk=50) == whole
    radius = torch.cat([radii(mapped, rows) for rows in (slice(0, 40), slice(40, 73), slice(73, 73))])
    assert torch.allclose(radius, radii(real), rtol=1e-12)
    flags = [inside(fake, mapped, radius, rows, 9) for rows in (slice(0, 100), slice(100, 101), slice(101, 101))]
    assert [len(part) for part in flags] == [100, 1, 0]
    assert float(torch.cat(flags).double().mean()) == whole[0]
    with pytest.raises(ModelError, match="more than 3 images"):
        precision_recall(fake[:3], real)


def test_precision_and_recall_of_a_narrow_generator():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, 4, generator=rng), torch.randn(400, 4, generator=rng)
    assert precision_recall(a, b + 10) == (0.0, 0.0)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert abs(kernel_distance(a, b)) < 0.1 < kernel_distance(a, b + 10)
    precision, recall = precision_recall(0.1 * a, b)
    assert precision > 0.95 and recall < 0.3


def test_maximum_mean_discrepancy_is_its_definition():
    fake, real = (features / features.norm(dim=1, keepdim=True) for features in feature_sets(90, 70))
    x, y = fake.double(), real.double()

    def kernel(a, b):  # from the differences themselves
        return torch.exp(-(a[:, None] - b[None]).square().sum(2) / (2 * 10**2)).mean()

    expected = 1000 * float(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert expected > 0.1
    assert maximum_mean_discrepancy(fake, real) == pytest.approx(expected, rel=1e-9)
    assert maximum_mean_discrepancy(fake, real, chunk=13) == pytest.approx(expected, rel=1e-9)
    assert maximum_mean_discrepancy(fake, fake) == pytest.approx(0, abs=1e-9)
    assert maximum_mean_discrepancy(fake, real, sigma=1.0) > 10 * expected


def test_kernel_sums_of_ranks_add_up(tmp_path):
    fake, real = feature_sets(50, 31)
    np.save(tmp_path / "fake.npy", fake.numpy())
    mapped = np.load(tmp_path / "fake.npy", mmap_mode="r")
    shares = [(slice(0, 20), slice(0, 31)), (slice(20, 50), slice(31, 31))]
    sums = sum(gaussian_kernel_sums(mapped, real, 10.0, a, b, chunk=8) for a, b in shares)
    assert torch.allclose(sums, gaussian_kernel_sums(fake, real), rtol=1e-12)
    assert discrepancy(sums, 50, 31) == pytest.approx(maximum_mean_discrepancy(fake, real), rel=1e-9)


def test_pixel_components_see_what_changes_most():
    """Images that differ in one direction only: its component has all the variance, and other images are projected on it.
    Images above 32 pixels are averaged first."""
    rng = torch.Generator().manual_seed(0)
    strength = torch.randint(0, 120, (50, 1, 1, 1), generator=rng)
    images = (torch.ones(50, 3, 4, 4) * strength).to(torch.uint8)
    pixels = PixelComponents.pixels(images)
    assert pixels.shape == (50, 48) and pixels[0].allclose(strength[0].float() / 127.5 - 1)
    features = PixelComponents.fit(pixels, components=2)(images)
    assert features[:, 0].var().item() == pytest.approx(pixels.var(0).sum().item(), rel=1e-4)
    assert features[:, 1].abs().max() < 1e-4 and features.mean(0).abs().max() < 1e-5
    turned = PixelComponents.fit(torch.cat([pixels, pixels, pixels[:1]]), components=2)  # more images than pixels
    assert turned(images)[:, 0].abs().allclose(features[:, 0].abs(), atol=0.05)
    large = torch.randint(0, 255, (2, 3, 64, 64), generator=rng).to(torch.uint8)
    expected = large.float().unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5)) / 127.5 - 1
    assert torch.allclose(PixelComponents.pixels(large), expected.flatten(1), atol=1e-5)
