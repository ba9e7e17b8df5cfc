"""The `data` section of a run's configuration."""

from typing import Literal

from pydantic import BaseModel, Field, field_validator

from data.paths import PathText, PathTexts


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
    """side of the square training images, in pixels"""
    workers: int = Field(0, ge=0)
    """loader processes per rank; 0 reads in the training process"""
    image_keys: list[str] = ["png", "jpg", "jpeg", "webp", "jfif", "gif", "bmp", "tif", "tiff", "avif"]
    """file extensions of images; the first that a sample has is read"""
    caption_key: str = "txt"
    """file extension of captions"""
    caption_field: str = ""
    """field of each sample's .json that holds its caption (default: captions are files of their own, see `caption_key`); of
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
        }

    @property
    def caption_source(self) -> str | None:
        """Where captions are, for the record of encoded shards; None for .txt."""
        if self.caption_field:
            return f"field {self.caption_field}"
        return None if self.caption_key == "txt" else self.caption_key

    @field_validator("cached", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false
