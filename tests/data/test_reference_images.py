"""Real images at their own size, and files of their statistics."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from cleanfid.utils import ResizeDataset
from PIL import Image

from data.errors import DataError
from data.reference_images import ReferenceImages, is_legacy, read_statistics
from data.shard_index import index_file


@pytest.fixture
def folder(tmp_path, encode):
    """Images of the forms and names that are found, and files that are not images of it."""
    turned = Image.new("RGB", (16, 32), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "b/two.PNG": encode((0, 1, 0), (5, 4)),
        "a-b.jpg": encode(image=turned, form="jpeg", exif=exif, quality=95),
        "a/one.JPEG": encode((200, 200, 200), (9, 8), "jpeg", quality=95),
        "a/clear.png": encode(image=Image.new("RGBA", (3, 2), (10, 20, 30, 0))),
        "c.webp": encode((7, 7, 7), (4, 4), "webp", lossless=True),
        "d.Bmp": encode((1, 2, 3), (6, 2), "bmp"),
        "._c.webp": b"resource fork",
        ".thumbs/x.png": encode(),
        "captions.txt": b"text",
    }
    for name, raw in files.items():
        (tmp_path / "real" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "real" / name).write_bytes(raw)
    return tmp_path / "real"


NAMES = ["a-b.jpg", "a/clear.png", "a/one.JPEG", "b/two.PNG", "c.webp", "d.Bmp"]  # "-" sorts before "/"


def test_folder(folder):
    images = ReferenceImages(folder)
    assert [place.name for place in images.places] == NAMES and len(images) == 6
    shapes = [tuple(image.shape) for image in images]
    assert shapes == [(3, 32, 16), (3, 2, 3), (3, 8, 9), (3, 4, 5), (3, 4, 4), (3, 2, 6)]
    assert all(image.dtype == torch.uint8 for image in images)
    assert images[1][:, 0, 0].tolist() == [10, 20, 30] and images[5][:, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(IndexError):
        images[6]


def test_pixels_are_clean_fids(folder):
    """What clean-fid hands to its resizing, by a resizing that changes nothing."""
    images = ReferenceImages(folder)
    theirs = ResizeDataset([str(place.file) for place in images.places], mode="clean")
    theirs.fn_resize = lambda pixels: pixels.astype(np.float32)
    for number in range(len(images)):
        assert torch.equal(images[number].float(), theirs[number]), NAMES[number]
    resized = build_resizer("clean")(images[0].permute(1, 2, 0).numpy())
    theirs.fn_resize = build_resizer("clean")
    assert torch.equal(torch.from_numpy(resized).permute(2, 0, 1), theirs[0])


def test_decoding_of_training(folder):
    images = ReferenceImages(folder, protocol_decoding=False)
    assert images[0].shape == (3, 16, 32) and images[1][:, 0, 0].tolist() == [255, 255, 255]
    assert images[5][:, 0, 0].tolist() == [1, 2, 3]


def test_links_to_folders(folder, tmp_path, encode):
    """They are followed, but not around in circles."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.png").write_bytes(encode())
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "circle").symlink_to(folder)
    names = [place.name for place in ReferenceImages(folder).places]
    assert names == [*NAMES, "linked/e.png"]


def test_identity_is_of_names_and_sizes_in_order(folder, tmp_path):
    first = ReferenceImages(folder).identity
    assert len(first) == 16 and first == ReferenceImages(folder).identity
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)  # new times, and another folder
    assert ReferenceImages(tmp_path / "copy").identity == first
    assert ReferenceImages(folder, protocol_decoding=False).identity != first
    changed = tmp_path / "copy" / "c.webp"
    changed.write_bytes(changed.read_bytes() + b"x")
    assert ReferenceImages(tmp_path / "copy").identity != first
    shutil.copy(folder / "c.webp", changed)
    assert ReferenceImages(tmp_path / "copy").identity == first
    changed.rename(changed.with_name("e.webp"))
    assert ReferenceImages(tmp_path / "copy").identity != first
    gone = ReferenceImages(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(DataError, match=r"a-b.jpg: No such file"):
        assert gone.identity


def test_broken_images_are_named(folder):
    images = ReferenceImages(folder)
    half = (folder / "a-b.jpg").read_bytes()
    for raw in (half[: len(half) // 2], b"no image", b""):
        (folder / "a-b.jpg").write_bytes(raw)
        for decoding in (True, False):
            with pytest.raises(DataError, match=r"real/a-b.jpg: does not decode \(") as error:
                ReferenceImages(folder, decoding)[0]
            assert "\n" not in str(error.value)
    (folder / "a-b.jpg").unlink()
    with pytest.raises(DataError, match=r"a-b.jpg: No such file"):
        images[0]


def test_folders_without_images(tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"bare: no image \(.bmp, .jpeg, .jpg, .png, .webp\) in it"):
        ReferenceImages(tmp_path / "bare")
    with pytest.raises(DataError, match="missing: No such file"):
        ReferenceImages(tmp_path / "missing")


def test_shards(shards, encode):
    """Images keep their size, in the shards' order; samples without one are counted."""
    large = encode(image=Image.new("RGBA", (30, 20), (9, 8, 7, 0)))
    tars = shards(
        12, 5, {1: {"png": None}, 3: {"png": None, "jpg": encode((50,) * 3, (7, 3), "jpeg")}, 6: {"png": large}}
    )
    images = ReferenceImages(tars)
    assert len(images) == 11 and list(images.rejected.values()) == [1] and "no image (.png" in str(images.rejected)
    assert [image[0, 0, 0].item() for image in images] == [0, 2, 50, 4, 5, 9, 7, 8, 9, 10, 11]
    assert images[2].shape == (3, 3, 7) and images[5].shape == (3, 20, 30)
    assert [place.name for place in images.places][:2] == ["s-000000.tar/k0000", "s-000000.tar/k0002"]
    assert ReferenceImages(tars, protocol_decoding=False)[5][:, 0, 0].tolist() == [255, 255, 255]
    assert len(ReferenceImages(tars, image_keys=["jpg", "png"])) == 11


def test_identity_of_shards(shards, encode):
    first = ReferenceImages(shards(12, 5))
    assert first.identity == ReferenceImages(shards(12, 5, folder="copy")).identity
    assert first.identity != ReferenceImages(shards(12, 5)[::-1]).identity
    assert first.identity != ReferenceImages(shards(12, 5, {2: {"png": encode(size=(99, 99))}}, "other")).identity
    assert first.identity != ReferenceImages(shards(12, 6, folder="cut")).identity


def test_broken_shards(shards, tmp_path):
    tars = shards(6, 3, {4: {"png": b"no image"}})
    images = ReferenceImages(tars)
    with pytest.raises(DataError, match=r"s-000003.tar, k0004: does not decode"):
        images[4]
    tars[0].write_bytes(tars[0].read_bytes()[:540])
    with pytest.raises(DataError, match=r"s-000000.tar, k0000: the shard ends inside it"):
        images[0]
    index_file(tars[0]).unlink()
    with pytest.raises(DataError, match=r"s-000000.tar: truncated"):
        ReferenceImages(tars)
    with pytest.raises(DataError, match=r"none of its 3 samples is usable: 3 have no image"):
        ReferenceImages(tars[1:], image_keys=["jpg"])
    with pytest.raises(DataError, match=r"missing.tar: No such file"):
        ReferenceImages([tmp_path / "missing.tar"])


@pytest.mark.parametrize("form", [np.float64, np.float32])
def test_statistics(tmp_path, form):
    features = np.random.default_rng(0).normal(size=(20, 6))
    mean, covariance = features.mean(0).astype(form), np.cov(features, rowvar=False).astype(form)
    np.savez(tmp_path / "coco_clean_custom_na.npz", mu=mean, sigma=covariance, extra=np.zeros(3))
    mu, sigma = read_statistics(tmp_path / "coco_clean_custom_na.npz")
    assert mu.dtype == sigma.dtype == torch.float64 and mu.shape == (6,) and sigma.shape == (6, 6)
    assert np.array_equal(mu.numpy(), mean) and np.array_equal(sigma.numpy(), covariance)


EYE, LINE = np.eye(4), np.zeros(4)
SKEW = EYE + np.eye(4, k=1)
WRONG = {
    "kid": ({"feats": np.zeros((9, 4), np.float32)}, r"features for KID \(clean-fid's `feats`\), not statistics"),
    "images": ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "an archive of images .*unpack it to a folder"),
    "others": ({"mean": LINE, "cov": EYE}, "holds mean, cov, not mu and sigma"),
    "no sigma": ({"mu": LINE}, "holds mu, not mu and sigma"),
    "flat": ({"mu": LINE, "sigma": LINE}, r"mu has shape \[4\] and sigma \[4\]"),
    "row": ({"mu": LINE[None], "sigma": EYE}, r"mu has shape \[1, 4\]"),
    "sizes": ({"mu": LINE, "sigma": np.eye(5)}, r"sigma \[5, 5\]"),
    "none": ({"mu": LINE[:0], "sigma": EYE[:0, :0]}, r"mu has shape \[0\]"),
    "whole numbers": ({"mu": LINE, "sigma": EYE.astype(int)}, "sigma int64, not floating point"),
    "complex": ({"mu": LINE, "sigma": EYE + 0j}, "complex128, not floating point"),
    "nan": ({"mu": LINE + np.nan, "sigma": EYE}, "a value is not finite"),
    "infinite": ({"mu": LINE, "sigma": np.diag([np.inf, 1, 1, 1])}, "a value is not finite"),
    "skew": ({"mu": LINE, "sigma": SKEW}, "not symmetric"),
    "negative": ({"mu": LINE, "sigma": -EYE}, "a variance is negative"),
    "objects": ({"mu": np.array([{}, None]), "sigma": EYE}, "cannot be read as .npz .*allow_pickle=False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_files_are_no_statistics(tmp_path, name):
    arrays, message = WRONG[name]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=f"a.npz: .*{message}") as error:
        read_statistics(tmp_path / "a.npz")
    assert "\n" not in str(error.value)


def test_files_that_are_no_npz(tmp_path):
    with pytest.raises(DataError, match=r"a.npz: .*No such file"):
        read_statistics(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "whole.npz", mu=np.arange(400.0), sigma=np.diag(np.arange(400.0)))
    whole = (tmp_path / "whole.npz").read_bytes()
    damaged = whole[:300] + bytes(100) + whole[400:]
    for raw in (b"", b"text", pickle.dumps({"mu": [0.0]}), whole[: len(whole) // 2], damaged):
        (tmp_path / "a.npz").write_bytes(raw)
        with pytest.raises(DataError, match=r"a.npz: cannot be read as .npz \(.+\): use an .npz with mu"):
            read_statistics(tmp_path / "a.npz")
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, LINE)
    with pytest.raises(DataError, match=r"a single array of shape \[4\], not an .npz"):
        read_statistics(tmp_path / "a.npz")


def test_legacy_statistics_by_name(tmp_path):
    assert is_legacy(tmp_path / "coco_legacy_pytorch_custom_na.npz") and is_legacy("FFHQ_Legacy_TensorFlow_1024.npz")
    assert not is_legacy(tmp_path / "legacy_pytorch" / "coco_clean_custom_na.npz")
