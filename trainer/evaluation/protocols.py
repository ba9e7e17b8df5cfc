"""Evaluation protocols: everything that changes a metric's value, by name, with its source and the published numbers."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace

from models.scorers.preprocess import Prepare
from trainer.config.evaluation import EvaluateSettings
from trainer.errors import UserError

CLASSIFIERS = ("digits", "emoji")  # `features` that are a classifier of the demo's labels
PREFIX = "A photo depicts "  # GigaGAN's, and from there DMD2's and SiD-LSG's


@dataclass(frozen=True)
class Clip:
    """The CLIP score: an open_clip model, and how images and captions reach it. side: of the square that images are cropped
    and resized to first; 0 leaves them to the model's own transform."""

    model: str = "ViT-g-14"
    pretrained: str = "laion2b_s12b_b42k"
    prefix: str = ""
    side: int = 0


@dataclass(frozen=True)
class Sampling:
    """How images are made. noise: as `ImageNoise`. precision: of the networks; "" is the run's. one_tokenizer: the first
    tokenizer also serves the second text encoder, whose padding then differs. rounded: pixels are rounded to
    8 bits, not truncated."""

    noise: str = "image"
    precision: str = ""
    one_tokenizer: bool = False
    rounded: bool = False


@dataclass(frozen=True)
class Protocol:
    """metrics: those that it publishes. reference: where the real images come from. features: the network of FID,
    patch-FID, KID, precision and recall; resize: how images reach its 299 pixels. side: of the square that generated and
    real images are both cropped and resized to before; 0: that of the run's images. patch: side of patch-FID's crop. images:
    how many, by default. resolution: of the generated images; 0 for any. about, published: source and results, which change no number."""

    name: str
    metrics: tuple[str, ...] = ("fid", "patch_fid", "kid", "precision_recall", "clip_score")
    reference: str = "heldout"
    features: str = "inception"
    resize: str = "clean"
    side: int = 0
    patch: int = 299
    clip: Clip = field(default_factory=Clip)
    sampling: Sampling = Sampling()
    images: int = 10_000
    resolution: int = 0
    about: str = field(default="", compare=False)
    published: dict[str, dict[str, float]] = field(default_factory=dict, compare=False)

    def whole(self, resolution: int) -> Prepare:
        """What happens to an image before the feature network. resolution: of the run's images."""
        return Prepare("square", self.side or resolution)

    def hash(self, own_weights: dict[str, str], **more: object) -> str:
        """A short hash of all that changes the numbers.

        own_weights: what the weights are that are not the published ones, by network; a path is no part of the hash. more:
        reference, prompts, number of images.
        """
        settings = {k: v for k, v in asdict(self).items() if k not in ("metrics", "about", "published")}
        if "clip" in own_weights:
            settings["clip"] |= {"model": "", "pretrained": ""}
        text = json.dumps(settings | {"weights": own_weights} | more, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


DMD2 = Clip(prefix=PREFIX, side=256)

PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("heldout", about="The run's held-out shards, or evaluate.reference."),
        Protocol(
            "dmd2-coco10k",
            metrics=("fid", "patch_fid", "clip_score"),
            reference="folder",
            side=512,
            clip=DMD2,
            sampling=Sampling("batch-4", "fp32", one_tokenizer=True),
            resolution=1024,
            about="DMD2's, SDXL at 1024 px: main/sdxl/test_folder_sdxl.py and main/coco_eval/coco_evaluator.py of "
            "tianweiy/DMD2. Prompts: coco10k/all_prompts.pkl, reference: coco10k/subset, both from its data release.",
            published={
                "DMD2, 1 step": {"fid": 19.01},
                "DMD2, 4 steps": {"fid": 19.32},
                "DMD2 LoRA, 4 steps": {"fid": 19.68},
            },
        ),
        Protocol(
            "dmd2-coco30k",
            metrics=("fid", "clip_score"),
            reference="folder",
            side=256,
            clip=DMD2,
            sampling=Sampling("batch-10", "fp32"),
            resolution=512,
            images=30_000,
            about="DMD2's, SD 1.5 at 512 px: main/test_folder_sd.py of tianweiy/DMD2. Prompts: captions_coco14_test.txt, "
            "reference: all of COCO's val2014.",
            published={"DMD2 without GAN, 39k steps": {"fid": 9.28}, "2k more steps with GAN": {"fid": 8.35}},
        ),
        Protocol(
            "gigagan-coco30k",
            metrics=("fid", "clip_score"),
            reference="folder",
            side=256,
            clip=DMD2,
            sampling=Sampling("device", rounded=True),
            resolution=512,
            images=30_000,
            about="GigaGAN's evaluator as SiD-LSG uses it (generate_onestep.py of mingyuanzhou/SiD-LSG): the same 30,000 "
            "captions and reference as dmd2-coco30k, noise from a device generator with the image's number.",
            published={
                "SiD-LSG, guidance 1.5": {"fid": 8.15, "clip_score": 0.304},
                "SiD-LSG, guidance 2": {"fid": 9.56, "clip_score": 0.313},
                "SiD-LSG, guidance 4.5": {"fid": 16.59, "clip_score": 0.317},
            },
        ),
        Protocol(
            "fid-teacher",
            metrics=("fid", "patch_fid", "kid", "clip_score"),
            reference="teacher",
            about="Ours: against the teacher's own images of the same prompts, with other noise. No public evaluator of "
            "such a score exists to agree with.",
        ),
    )
}
OURS = ("heldout", "fid-teacher")  # whose networks the settings choose
CHOICES = ("features", "resize", "patch", "clip_model", "clip_pretrained")


def resolve(settings: EvaluateSettings) -> Protocol:
    """The protocol that the settings name, with the choices that it leaves open. Raises UserError for a setting that it
    fixes."""
    protocol = PROTOCOLS[settings.protocol]
    if protocol.name not in OURS:
        if fixed := [key for key in CHOICES if key in settings.model_fields_set]:
            raise UserError(
                f"evaluate.{fixed[0]}: protocol {protocol.name} fixes it: remove the setting, or use evaluate.protocol=heldout"
            )
        return protocol
    chosen = replace(
        protocol,
        features=settings.features,
        resize=settings.resize,
        patch=settings.patch,
        clip=Clip(settings.clip_model, settings.clip_pretrained),
    )
    if settings.features in CLASSIFIERS:  # small images without published networks: pixels count, too
        chosen = replace(chosen, metrics=("fid", "kid", "pixel_fd", "precision_recall"))
    return chosen
