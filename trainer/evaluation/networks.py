"""The networks of a protocol's metrics, each as a function from images (and prompts) to rows of numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from data.prompts import Prompt
from models.image_metrics import PixelComponents
from models.scorers.clip import ClipImages, ClipScore
from models.scorers.cmmd import Cmmd
from models.scorers.dinov2 import DinoV2
from models.scorers.inception import Inception
from models.scorers.preference import HpsV2, PickScore
from models.scorers.preprocess import Prepare, over_threads
from trainer.errors import UserError
from trainer.evaluation.classifier import DemoClassifier, accuracy_names
from trainer.evaluation.protocols import CLASSIFIERS, Protocol
from trainer.evaluation.weights import Weights
from trainer.training.run import Run

# The rows that each metric is computed from. Those of the first group are also made of the real images.
COMPARED = {
    "fid": "features",
    "kid": "features",
    "precision_recall": "features",
    "patch_fid": "patch",
    "pixel_fd": "pixels",
    "cmmd": "cmmd",
    "fd_dinov2": "dinov2",
}
SCORED = {"clip_score": "clip", "pick_score": "pick_score", "hps_v2_1": "hps_v2_1"}
FRECHET = ("fid", "patch_fid", "fd_dinov2")  # need more images than features: a covariance of full rank

ImageRows = Callable[[list[Tensor]], Tensor]
PromptRows = Callable[[list[Tensor], list[Prompt]], Tensor]


def compared_blocks(metrics: tuple[str, ...]) -> list[str]:
    """The rows that these metrics need of generated and of real images."""
    return list(dict.fromkeys(COMPARED[metric] for metric in metrics if metric in COMPARED))


def needed_networks(protocol: Protocol, metrics: tuple[str, ...]) -> list[str]:
    """Names of the networks whose weights these metrics need, as in `evaluate.networks`."""
    blocks = compared_blocks(metrics)
    needed = []
    if {"features", "patch"} & set(blocks) and protocol.features not in CLASSIFIERS:
        needed.append(protocol.features)
    if "clip_score" in metrics:
        needed.append("clip")
    needed += [name for name in ("cmmd", "dinov2") if name in blocks]
    needed += [name for name in ("pick_score", "hps_v2_1") if name in metrics]
    return list(dict.fromkeys(needed))


@dataclass(frozen=True)
class Networks:
    """images: for each block of rows, a function of uint8 images, each [3, H, W]. prompted: functions that also need the
    prompts. accuracies: the metrics of the block "correct", and file: that of the classifier. name: of the feature network, for metrics.json."""

    name: str
    images: dict[str, ImageRows]
    prompted: dict[str, PromptRows] = field(default_factory=dict)
    accuracies: tuple[str, ...] = ()
    file: Path | None = None

    def rows(self, images: list[Tensor], prompts: list[Prompt]) -> dict[str, Tensor]:
        """All blocks [B, D] of generated images."""
        scored = {block: call(images, prompts) for block, call in self.prompted.items()}
        return self.rows_of_real(images) | scored

    def rows_of_real(self, images: list[Tensor]) -> dict[str, Tensor]:
        """The blocks [B, D] of real images."""
        return {block: call(images).float() for block, call in self.images.items()}

    def with_pixels(self, pixels: ImageRows) -> "Networks":
        """With another function of the block "pixels": generated images are projected on the real ones' components."""
        return replace(self, images=self.images | {"pixels": pixels})

    def widths(self, side: int) -> dict[str, int]:
        """The number of features of each block, from a black square image."""
        image = torch.zeros(3, side, side, dtype=torch.uint8)
        return {block: call([image]).shape[1] for block, call in self.images.items()}


def load_networks(run: Run, protocol: Protocol, metrics: tuple[str, ...], weights: dict[str, Weights]) -> Networks:
    """Loads what the metrics need onto this rank's device. Raises UserError and ModelError."""
    blocks, device = compared_blocks(metrics), run.world.device
    if run.settings.data.buckets and ("pixels" in blocks or protocol.features in CLASSIFIERS):
        raise UserError(
            "data.buckets: pixel_fd and the classifiers of the demos compare images of one size: choose other evaluate.metrics "
            "and evaluate.features"
        )
    images: dict[str, ImageRows] = {}
    prompted: dict[str, PromptRows] = {}
    name, accuracies, file = "none", (), None
    clip = protocol.clip
    if {"features", "patch"} & set(blocks):
        if protocol.features in CLASSIFIERS:
            if "patch" in blocks:
                raise UserError(
                    f"evaluate.metrics: patch_fid needs a network, not the classifier of {protocol.features}"
                )
            classifier = DemoClassifier(run)
            name, file, accuracies = classifier.name, classifier.file, tuple(accuracy_names(classifier.labels))
            network = classifier.features
            prompted["correct"] = lambda shown, prompts: classifier.correct(shown, [p.meta for p in prompts])
        elif protocol.features == "inception":
            network, name = Inception(weights["inception"].path, device, protocol.resize), "Inception 2015"
        elif protocol.features == "dinov2":
            network, name = DinoV2(weights["dinov2"].path, device), "DINOv2 ViT-L/14"
        else:
            network, name = (
                ClipImages(clip.model, weights["clip"].pretrained, device, weights["clip"].path),
                f"CLIP {clip.model}",
            )
        if "features" in blocks:
            images["features"] = _after(protocol.whole(run.settings.data.resolution), network)
        if "patch" in blocks:
            images["patch"] = _after(Prepare("patch", protocol.patch), network)
        if protocol.features in weights and not weights[protocol.features].published:
            name += f" ({weights[protocol.features].identity})"
    if "pixels" in blocks:
        images["pixels"] = pixel_rows
    if "cmmd" in blocks:
        images["cmmd"] = Cmmd(weights["cmmd"].path, device)
    if "dinov2" in blocks:
        images["dinov2"] = DinoV2(weights["dinov2"].path, device)
    if "clip_score" in metrics:
        prepare = Prepare("square", clip.side) if clip.side else None
        score = ClipScore(clip.model, weights["clip"].pretrained, device, weights["clip"].path, clip.prefix, prepare)
        prompted["clip"] = _scored(score)
    if "pick_score" in metrics:
        prompted["pick_score"] = _scored(PickScore(weights["pick_score"].path, device))
    if "hps_v2_1" in metrics:
        prompted["hps_v2_1"] = _scored(HpsV2(weights["hps_v2_1"].path, device))
    return Networks(name, images, prompted, accuracies, file)


def _after(prepare: Prepare, network: ImageRows) -> ImageRows:
    return lambda images: network(over_threads(prepare, images))


def _scored(score: Callable[[list[Tensor], list[str]], Tensor]) -> PromptRows:
    """A score [B] as a column [B, 1]."""
    return lambda images, prompts: score(images, [prompt.text for prompt in prompts])[:, None].float()


def pixel_rows(images: list[Tensor]) -> Tensor:
    """Real images as rows of pixels, which the reference's components are found from."""
    return PixelComponents.pixels(torch.stack([image.cpu() for image in images]))
