"""FID's Inception features, against clean-fid, pytorch-fid and torch-fidelity with the same random weights; and files
of weights that are missing, damaged or hostile."""

import os

import numpy as np
import pytest
import pytorch_fid.inception
import torch
from cleanfid.fid import get_folder_features
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from models.errors import ModelError
from models.scorers.inception import Inception, network
from models.scorers.published import INCEPTION
from models.scorers.weights import read_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Weights of the network's names and shapes, with activations of about the same scale in all its layers."""
    rng = torch.Generator().manual_seed(0)
    whole = network()
    for layer in whole.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=rng)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=rng)
            layer.running_var.uniform_(0.8, 1.2, generator=rng)
            layer.bias.data.normal_(0, 0.1, generator=rng)
    return whole.state_dict()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / INCEPTION.names[0]
    torch.save(state, file)
    return file


@pytest.fixture(scope="module")
def inception(file) -> Inception:
    return Inception(file, CPU)


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    sizes = [(640, 425), (256, 256), (299, 299), (640, 425)]
    coarse = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).resize(size) for size in sizes]
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in coarse]


@pytest.fixture
def reference(state, monkeypatch):
    """pytorch-fid's network, which clean-fid uses too in its PyTorch modes. Takes normalised images."""
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state)
    return pytorch_fid.inception.InceptionV3(resize_input=False, normalize_input=False).eval()


def test_features_are_clean_fids(file, inception, images, reference, tmp_path):
    for place, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{place}.png")
    expected = torch.from_numpy(
        get_folder_features(
            str(tmp_path),
            model=lambda x: reference((x - 128) / 128)[0].flatten(1).detach(),
            num_workers=0,
            device=CPU,
            mode="clean",
            verbose=False,
        )
    )
    features = inception(images)
    assert features.shape == (4, 2048) and features.dtype == torch.float32 and not features.requires_grad
    assert (features - expected).abs().max() < 2e-5
    assert expected.std(0).mean() > 5e-3  # the images differ by far more
    assert (Inception(file, CPU, "pytorch")(images) - expected).abs().max() > 1e-3


def test_features_are_pytorch_fids(file, images, reference):
    reference.resize_input, reference.normalize_input = True, True
    with torch.no_grad():
        expected = torch.cat([reference(image[None].float() / 255)[0].flatten(1) for image in images])
    assert (Inception(file, CPU, "pytorch")(images) - expected).abs().max() < 2e-5


def test_features_are_torch_fidelitys_where_nothing_is_resized(file, inception, images):
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    assert (inception(images[2:3]) - theirs(images[2][None])[0]).abs().max() < 2e-5


def test_features_do_not_depend_on_the_batch(inception, images):
    together = inception(images)
    for image, row in zip(images, together, strict=True):
        assert (inception([image])[0] - row).abs().max() < 1e-5


def test_safetensors_and_weights_without_batch_counts(inception, state, images, tmp_path):
    save_file(state, tmp_path / "inception.safetensors")
    bare = {key: value for key, value in state.items() if "num_batches" not in key}  # as older PyTorch saved them
    torch.save(bare, tmp_path / "bare.pth")
    expected = inception(images[:1])
    for name in ("inception.safetensors", "bare.pth"):
        assert torch.equal(Inception(tmp_path / name, CPU)(images[:1]), expected)


def test_unusable_files_are_refused_in_one_line(file, state, tmp_path):
    raw = file.read_bytes()
    (tmp_path / "cut.pth").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "noise.pth").write_bytes(os.urandom(1000))
    (tmp_path / "noise.safetensors").write_bytes(os.urandom(1000))
    torch.save({key: value for key, value in state.items() if key != "fc.bias"}, tmp_path / "headless.pth")
    torch.save({**state, "fc.bias": torch.zeros(1000)}, tmp_path / "torchvision.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "inception-2015-12-05.pt"))
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "other.pt"))
    for name, message in {
        "none.pth": "no such file",
        "cut.pth": "damaged",
        "empty.pth": "damaged",
        "noise.pth": "damaged",
        "noise.safetensors": "cannot be read",
        "headless.pth": "fc.bias",
        "torchvision.pth": "fc.bias",
        "list.pth": "holds a list",
        "inception-2015-12-05.pt": "pt_inception-2015-12-05-6726825d.pth",
        "other.pt": "TorchScript",
    }.items():
        with pytest.raises(ModelError, match=message) as caught:
            Inception(tmp_path / name, CPU)
        assert "\n" not in str(caught.value) and name in str(caught.value), name


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    folder = tmp_path / "proof"
    torch.save({"weight": Hostile(str(folder))}, tmp_path / "hostile.pth")
    with pytest.raises(ModelError, match="can run code"):
        read_weights(tmp_path / "hostile.pth")
    assert not folder.exists()
    torch.load(tmp_path / "hostile.pth", weights_only=False)
    assert folder.exists()  # it would have run
