"""The `data` section of a run's configuration."""

from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from data.buckets import Size, auto_shapes, check_shapes
from data.filters import Filter
from data.paths import PathText, PathTexts
from data.selection import Selection


class DataSettings(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """Which samples are read, and how."""

    train: PathTexts = ""
    """training data: shards as a folder, a glob, a brace pattern such as a-{000000..000011}.tar, or a list of these; or
    prompts alone, where no images are needed: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, or several; or shards at
    s3://, http(s)://, hf:// or pipe: (docs/data.md)"""
    weights: list[float] = []
    """how often samples are drawn from each entry of `train`, relative to each other (default: in proportion to their samples)"""
    cache_dir: PathText = ""
    """local folder that shards at URLs are copied to before training, to be read exactly; empty streams them"""
    cache_gb: float = Field(0, ge=0)
    """size in GB that these copies may have, on each node (0: what the disk holds)"""
    retry_seconds: float = Field(300, ge=0)
    """how long an interrupted read from a URL is tried again before its shard is given up"""
    shuffle_buffer: int = Field(1000, ge=1)
    """undecoded samples that a loader process of a stream holds to shuffle them"""
    max_rejected: float = Field(0.5, ge=0, le=1)
    """share of unusable samples at which training stops, once there were a thousand samples"""
    heldout: PathTexts = ""
    """held-out shards that evaluation compares with, or prompts that it uses, named in the same ways"""
    labelled: PathTexts = ""
    """shards that the classifier of a demo's scores is trained on (default: those of `train`)"""
    resolution: int = Field(1024, ge=8)
    """side of the square training images, in pixels; with `buckets`, of the square one among them"""
    buckets: Literal["auto"] | list[Size] = []
    """aspect-ratio buckets, [[height, width], ...] in pixels: each image is resized and cropped to the one nearest to its aspect
    ratio, and each step's batch is of one bucket; "auto" makes about as many pixels as `resolution` has, from 2:1 to 1:2
    (default: squares only)"""
    bucket_step: int = Field(64, ge=1)
    """sides of the buckets that "auto" makes are multiples of it, in pixels"""
    min_size: int = Field(0, ge=0)
    """samples whose image has a shorter side, in pixels, are left out"""
    filters: list[str] = []
    """what samples must fulfil, each as FIELD OPERATOR VALUE: "aesthetic >= 6.25", "nsfw == false"; a field is width, height,
    aspect (long by short side), caption_length (characters), or one of the sample's .json (a.b: b of the object a)"""
    crop: Literal["centre", "random"] = "centre"
    """which part of a resized training image is used"""
    flip: bool = False
    """mirrors half of the training images, chosen at random"""
    workers: int = Field(0, ge=0)
    """loader processes per rank; 0 reads in the training process"""
    image_keys: list[str] = ["png", "jpg", "jpeg", "webp", "jfif", "gif", "bmp", "tif", "tiff", "avif"]
    """file extensions of images; the first that a sample has is read"""
    caption_key: str = "txt"
    """file extension of captions"""
    caption_field: str | dict[str, float] = ""
    """field of each sample's .json that holds its caption (default: captions are files of their own, see `caption_key`); or
    several with their weights, {caption: 1, blip: 3, txt: 1}, of which each step draws one (`caption_key` names the file); of
    a file of prompts: the field or column (default: prompt, caption or text)"""
    cached: Literal["auto", "off", "require"] = "auto"
    """encoded shards (`disback shards --encode`): "auto" trains on their latents and text if `train` names such shards,
    "require" refuses to train without everything that the stage can use, "off" reads captions and images only"""

    @property
    def keys(self) -> dict:
        """Where a sample's image and caption are, as arguments of ShardDataset."""
        return {
            "image_keys": self.image_keys,
            "caption_key": self.caption_key,
            "caption_field": self.caption_field,
            "selection": self.selection,
        }

    @property
    def shapes(self) -> tuple[Size, ...]:
        """The shapes (height, width) of training images."""
        if self.buckets == "auto":
            return tuple(auto_shapes(self.resolution, self.bucket_step))
        return tuple(self.buckets) or ((self.resolution, self.resolution),)

    @property
    def size(self) -> Size:
        """The shape (height, width) of images whose prompt has none: the square one, or the first bucket."""
        square = self.resolution, self.resolution
        return square if square in self.shapes else self.shapes[0]

    @property
    def selection(self) -> Selection:
        """Which samples are read and in which shape, without random crops and flips, which are for training only."""
        buckets = self.shapes if self.buckets else ()
        return Selection(buckets, tuple(map(Filter.parse, self.filters)), self.min_size)

    @property
    def caption_source(self) -> str | None:
        """Where captions are, for the record of encoded shards; None for .txt."""
        if isinstance(self.caption_field, dict) and self.caption_field:
            return f"fields {' '.join(self.caption_field)}"
        if self.caption_field:
            return f"field {self.caption_field}"
        return None if self.caption_key == "txt" else self.caption_key

    @field_validator("buckets", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        pairs = value if isinstance(value, list | tuple) else [()] * (value != "auto")
        if not all(isinstance(p, list | tuple) and len(p) == 2 and all(type(side) is int for side in p) for p in pairs):
            raise ValueError('must be "auto" or a list of [height, width] in pixels')
        return value

    @field_validator("caption_field", mode="before")
    @classmethod
    def _weights(cls, value: object) -> object:
        try:
            fine = isinstance(value, str) or all(isinstance(n, str) and float(w) > 0 for n, w in value.items())
        except (AttributeError, TypeError, ValueError):
            fine = False
        if not fine:
            raise ValueError("must be the name of a field, or {name: weight, ...} with weights above 0")
        return value

    @field_validator("filters")
    @classmethod
    def _parsed(cls, value: list[str]) -> list[str]:
        for text in value:
            Filter.parse(text)
        return value

    @model_validator(mode="after")
    def _shapes(self) -> "DataSettings":
        check_shapes(self.shapes if self.buckets else ())
        return self

    @field_validator("cached", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false
