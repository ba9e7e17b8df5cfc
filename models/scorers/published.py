"""The weights that published scores were computed with: names, hashes and where to get them. None: not known."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights, or a repository of the Hugging Face hub.

    names: the names under which the same bytes are published; any of them for a repository. sha256: hexadecimal, of the
    file. bytes: its size. url: of the file. repository: of the hub. licence: of the weights.
    """

    names: tuple[str, ...]
    sha256: str | None = None
    bytes: int | None = None
    url: str | None = None
    repository: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class ClipWeights(WeightsFile):
    """Weights of an open_clip model. model, tag: their names in open_clip."""

    model: str = ""
    tag: str = ""


INCEPTION = WeightsFile(
    names=("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    bytes=95_628_359,
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    licence="Apache-2.0",
)
DINOV2 = WeightsFile(
    names=("dinov2_vitl14_pretrain.pth",),
    sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    bytes=1_217_586_395,
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    licence="Apache-2.0",
)
CMMD = WeightsFile(names=("model.safetensors", "pytorch_model.bin"), repository="openai/clip-vit-large-patch14-336")
PICK_SCORE = WeightsFile(names=("model.safetensors",), repository="yuvalkirstain/PickScore_v1")
HPS_V2_1 = WeightsFile(names=("HPS_v2.1_compressed.pt",), repository="xswu/HPSv2")
CLIP_G = ClipWeights(  # of the CLIP scores of GigaGAN, DMD2 and SiD-LSG, which call it ViT-G/14
    names=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    repository="laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    licence="MIT",
    model="ViT-g-14",
    tag="laion2b_s12b_b42k",
)
CLIP_L = ClipWeights(  # of ImageReward's CLIP score
    names=("open_clip_model.safetensors",),
    repository="timm/vit_large_patch14_clip_224.openai",
    model="ViT-L-14-quickgelu",
    tag="openai",
)
