"""The `evaluate` section of a configuration."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator

from data.paths import EXPANDED, ClipModel, PathText, PathTexts

Metric = Literal[
    "fid", "patch_fid", "kid", "precision_recall", "pixel_fd", "clip_score", "cmmd", "fd_dinov2", "pick_score", "hps_v2_1"
]  # fmt: skip
Network = Literal["inception", "dinov2", "clip", "cmmd", "pick_score", "hps_v2_1"]


class EvaluateSettings(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """Scores of generated images."""

    what: PathTexts = "generator"
    """"generator", "teacher", "start", a checkpoint such as "step-00000500" (or "step-00000500-raw", its weights before
    averaging), a path's node such as "node-0003", a pipeline, denoiser or LoRA folder, a LoRA file, or a
    pipeline of the hub"""
    watch: bool = False
    """also evaluates every new checkpoint until the run is finished"""
    poll_seconds: float = Field(60.0, gt=0)
    """interval at which --watch looks for new checkpoints, in seconds"""
    folder: str = "eval"
    """folder of the results, in the run folder; it holds results of one protocol only"""
    protocol: Literal["heldout", "dmd2-coco10k", "dmd2-coco30k", "gigagan-coco30k", "fid-teacher"] = "heldout"
    """how the numbers are made (docs/evaluation.md); all but "heldout" and "fid-teacher" fix the networks and how images are
    resized"""
    metrics: list[Metric] = []
    """what is computed (default: what the protocol publishes)"""
    images: int | None = Field(None, ge=2)
    """generated images (default: the protocol's number, 10,000 for "heldout" and "fid-teacher")"""
    few_images: bool = False
    """computes Frechet distances from fewer images than the features have dimensions, which the job refuses otherwise: they
    come out too high, and only compare with others of the same number of images"""
    batch: int = Field(16, ge=1)
    """images per network call"""
    chunk: int = Field(16, ge=1)
    """images whose features are saved at a time: what a killed job loses at most, per process"""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """image i is drawn with seed + i, or as the protocol says"""
    features: Literal["inception", "dinov2", "clip", "digits", "emoji"] = "inception"
    """network whose features FID, patch-FID, KID, precision and recall compare; "digits" and "emoji" are a classifier of the
    demo's labels, which the first evaluation trains on `data.labelled`"""
    resize: Literal["clean", "pytorch"] = "clean"
    """how images reach Inception's 299 pixels: as clean-fid by default, or as pytorch-fid, whose statistics files need it"""
    patch: int = Field(299, ge=1)
    """side of the centre crop that patch-FID compares, in pixels"""
    clip_model: ClipModel = "ViT-g-14"
    """open_clip model of the CLIP score (and of `features: clip`), or local-dir:FOLDER"""
    clip_pretrained: PathText = "laion2b_s12b_b42k"
    """its weights: an open_clip tag, or a file"""
    prompts: PathText = ""
    """file of captions: .txt, .jsonl, .csv, .tsv, .parquet, COCO's .json, a list of strings in .pkl, or a folder of .txt
    (default: those of `data.heldout`)"""
    prompt_key: str = ""
    """field or column of the captions in that file (default: prompt, caption or text)"""
    images_per_prompt: int = Field(1, ge=1)
    """images in a row that are made of the same prompt"""
    reference: PathText = ""
    """real images: a folder, shards, or an .npz with `mu` and `sigma` (default: `data.heldout`)"""
    weights: PathText = ""
    """folder that the networks' weight files are looked for in first (`disback evaluate --weights` lists them)"""
    networks: Annotated[dict[Network, str], EXPANDED] = {}
    """file or folder of a network, instead of looking for its published weights; whatever it holds is used, and named in the
    results"""
    list_weights: bool = False
    """only lists the weights that the metrics need, and where they were looked for"""
    cache: PathText = ""
    """folder of the reference's features, which runs can share (default: references/ in the results folder)"""
    keep: Literal["", "shards", "folder", "geneval", "dpg"] = ""
    """keeps the images: as WebDataset shards, as PNG files, or laid out as the evaluators of GenEval or DPG-Bench read them"""
    node_images: int = Field(8, ge=0)
    """images drawn from each node of the path, for the report; 0 draws none"""
    classifier: PathText = ""
    """folder of the demo's classifier (default: classifier/ in the run folder)"""

    @field_validator("folder")
    @classmethod
    def _one_name(cls, value: str) -> str:
        if not value or value.startswith(".") or "/" in value:
            raise ValueError(f"{value!r} is not the name of a folder in the run folder, such as eval-coco")
        return value
