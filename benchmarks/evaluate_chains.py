"""Random images and weights, and the ways from a folder of images to features, and from features to metrics: ours,
torch-fidelity's and clean-fid's."""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cleanfid.fid
import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity import metric_fid, metric_kid, metric_prc
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.utils import extract_featuresdict_from_input_id

from data.reference_images import ReferenceImages
from models.scorers.inception import network
from trainer.distributed.world import World
from trainer.evaluation.generate import fill
from trainer.evaluation.references import Reference
from trainer.evaluation.rows import Rows
from trainer.evaluation.scores import scores

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, CPU)
CHUNK = 64  # evaluate.chunk
SUBSET = 1000  # images of a subset of KID, for all three


def write_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """PNGs with the 1/f spectrum of photographs: plain noise would compress and decode unlike them."""
    rng, (height, width) = np.random.default_rng(0), size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no mean
    folder.mkdir()
    for number in range(count):
        phases = rng.normal(size=(2, 3, *frequency.shape))
        pixels = np.fft.irfft2((phases[0] + 1j * phases[1]) / frequency, size)
        pixels = (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number:04d}.png")


def write_inception(file: Path) -> None:
    """Random weights with which all layers have activations of about the same scale."""
    rng, whole = torch.Generator().manual_seed(0), network()
    for layer in whole.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=rng)
    torch.save(whole.state_dict(), file)


def write_clip(folder: Path, config: dict) -> None:
    """Random weights of a CLIP model: a folder of open_clip, and for torch-fidelity a TorchScript with the same
    tensors."""
    torch.manual_seed(0)
    state = open_clip.CLIP(**config).state_dict()
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(state, folder / "open_clip_model.safetensors")
    root = nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]
        place.register_buffer(leaf, value)
    torch.jit.script(root).save(str(folder / "torch_fidelity.pt"))


def ours(folder: Path, root: Path, batch: int, measure: Callable[[list[Tensor], list[int]], Tensor]) -> Tensor:
    """Rows of the images of a folder, as an evaluation makes those of its reference."""
    images = ReferenceImages(folder)
    with tempfile.TemporaryDirectory(dir=root) as place:
        rows = Rows.open(Path(place) / "rows", len(images), CHUNK, {}, WORLD)
        fill(
            rows,
            WORLD,
            lambda numbers: [images[number] for number in numbers],
            lambda made, numbers: {"features": measure(made, numbers)},
            batch,
            "benchmark",
        )
        return rows.read("features")


def torch_fidelitys(folder: Path, batch: int, extractor: FeatureExtractorBase, workers: bool) -> Tensor:
    """workers: with as many processes as it starts by default."""
    how = {"batch_size": batch, "cuda": False, "save_cpu_ram": not workers, "verbose": False, "cache": False}
    return next(iter(extract_featuresdict_from_input_id(1, extractor, input1=str(folder), **how).values()))


def clean_fids(
    folder: Path, batch: int, layers: nn.Module, workers: int, prepare: Callable[[np.ndarray], np.ndarray] | None = None
) -> Tensor:
    found = cleanfid.fid.get_folder_features(
        str(folder),
        model=lambda images: layers((images - 128) / 128),
        num_workers=workers,
        batch_size=batch,
        device=CPU,
        mode="clean",
        verbose=False,
        custom_image_tranform=prepare,
    )
    return torch.from_numpy(found)


class Averages(FeatureExtractorBase):
    """torch-fidelity's resize, then averages of the colours instead of a network."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        resized = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
        return (((resized - 128) / 128).mean((2, 3)),)

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return ("3",)


def random_features(count: int, size: int) -> Iterator[Tensor]:
    """Two sets of correlated features [count, size], not below 0, with slightly different means."""
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=rng) / torch.arange(1, size + 1)[:, None].sqrt()
    for shift in (0.0, 0.02):
        yield (torch.randn(count, size, generator=rng) @ mix / size**0.5 + shift).relu()


def stored(root: Path, name: str, features: Tensor) -> Rows:
    rows = Rows.open(root / name, len(features), CHUNK, {}, WORLD)
    for number in range(rows.chunks):
        rows.write(number, {"features": features[list(rows.images(number))]})
    return rows


def metrics(root: Path, count: int, size: int) -> dict[str, dict[str, Callable[[], list[float]]]]:
    """Functions from random features to the values of each metric, by metric and tool. Ours reads the features from an
    evaluation's files."""
    fake, real = random_features(count, size)
    rows, real_rows = stored(root, "fake", fake), stored(root, "real", real)
    arrays, subset = (fake.numpy(), real.numpy()), min(SUBSET, count)

    def ours(metric: str, *names: str) -> list[float]:
        found = scores(rows, Reference("random", real_rows, WORLD), (metric,), (), WORLD)
        return [found[name] for name in names]

    def torch_fidelitys_fid() -> list[float]:
        both = [metric_fid.fid_features_to_statistics(each) for each in (fake, real)]
        return list(metric_fid.fid_statistics_to_metric(*both, verbose=False).values())

    def torch_fidelitys_kid() -> list[float]:
        found = metric_kid.kid_features_to_metric(fake, real, kid_subset_size=subset, verbose=False)
        return [found[metric_kid.KEY_METRIC_KID_MEAN]]

    def torch_fidelitys_manifolds() -> list[float]:
        found = metric_prc.prc_features_to_metric(fake, real, verbose=False)
        return [found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]]

    return {
        "FID": {
            "ours": lambda: ours("fid", "fid"),
            "torch-fidelity": torch_fidelitys_fid,
            "clean-fid": lambda: [float(cleanfid.fid.fid_from_feats(*arrays))],
        },
        "KID": {
            "ours": lambda: ours("kid", "kid"),
            "torch-fidelity": torch_fidelitys_kid,
            "clean-fid": lambda: [cleanfid.fid.kernel_distance(*arrays, max_subset_size=subset)],
        },
        "precision, recall": {
            "ours": lambda: ours("precision_recall", "precision", "recall"),
            "torch-fidelity": torch_fidelitys_manifolds,
        },
    }
