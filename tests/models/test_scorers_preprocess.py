"""Crops and resizes of the published protocols, against Pillow, torchvision, clean-fid and pytorch-fid."""

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from PIL import Image
from torch.nn import functional
from torchvision.transforms.functional import center_crop

from models.scorers.preprocess import Prepare, bilinear_resize, by_size, clean_resize, over_threads

SIZES = [(640, 425), (425, 640), (500, 333), (333, 500), (299, 299), (256, 256), (200, 517)]  # width, height


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A uint8 image [H, W, 3] with structure of all scales: noise alone would vanish in a resize."""
    rng = np.random.default_rng(seed)
    image = sum(
        np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((width, height)), np.float32)
        for n in (3, 20, 150)
    )
    return (image / 3).astype(np.uint8)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_square_is_the_crop_and_lanczos_resize_of_gigagan_and_dmd2(size):
    image = picture(*size)
    pil = Image.fromarray(image)
    expected = center_crop(pil, min(pil.size)).resize((256, 256), Image.LANCZOS)
    result = Prepare("square", 256)(tensor(image))
    assert result.dtype == torch.uint8 and np.array_equal(array(result), np.asarray(expected))


@pytest.mark.parametrize("size,start", [((640, 425), (108, 0)), ((500, 333), (84, 0)), ((333, 500), (0, 84))])
def test_centres_are_rounded_to_even(size, start):
    left, top = start
    image, short = picture(*size), min(size)
    expected = image[top : top + short, left : left + short]
    assert np.array_equal(array(Prepare("square", short)(tensor(image))), expected)  # of this side: no resize
    assert np.array_equal(array(Prepare("patch", short)(tensor(image))), expected)


def test_patch_leaves_an_image_with_a_short_side_whole():
    patch = Prepare("patch", 299)
    large, narrow = tensor(picture(640, 425)), tensor(picture(640, 298))
    assert torch.equal(patch(large), large[:, 63:362, 170:469])  # 170.5 becomes 170
    assert torch.equal(patch(narrow), narrow) and torch.equal(Prepare()(narrow), narrow)


@pytest.mark.parametrize("size", [*SIZES, (1024, 1024), (64, 48)])
def test_clean_resize_is_clean_fids(size):
    image = picture(*size)
    expected = tensor(build_resizer("clean")(image))
    result = clean_resize([tensor(image)])[0]
    assert result.dtype == torch.float32
    assert (result - expected).abs().max() < 0.01
    if size != (299, 299):  # rounded to 8 bits, or without antialiasing, it is another resize
        rounded = tensor(np.asarray(Image.fromarray(image).resize((299, 299), Image.BICUBIC), np.float32))
        assert (rounded - expected).abs().mean() > 0.1
    if min(size) > 299:
        plain = functional.interpolate(tensor(image)[None].float(), size=(299, 299), mode="bicubic")[0]
        assert (plain - expected).abs().mean() > 0.1


def test_clean_resize_clamps_what_bicubic_overshoots():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :, 32:] = 255
    result = clean_resize([image])
    assert result.min() == 0 and result.max() == 255


@pytest.mark.parametrize("size", SIZES)
def test_bilinear_resize_is_pytorch_fids(size):
    image = picture(*size)
    expected = tensor(build_resizer("legacy_pytorch")(image)) / 255
    assert (bilinear_resize([tensor(image)])[0] - expected).abs().max() < 1e-6


def test_images_of_several_sizes_keep_their_order():
    images = [tensor(picture(*size, seed=place)) for place, size in enumerate([*SIZES, *SIZES[::2]])]
    together = clean_resize(images)
    for image, row in zip(images, together, strict=True):
        assert torch.equal(clean_resize([image])[0], row)
    calls = []
    by_size(lambda stack: calls.append(len(stack)) or stack.float().mean((1, 2, 3)), images)
    assert sorted(calls) == [1, 1, 1, 2, 2, 2, 2]  # one call for each size
    assert over_threads(lambda image: image.shape, images) == [image.shape for image in images]
