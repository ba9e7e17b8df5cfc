"""The `data` section of a run's configuration."""

from typing import Literal

from pydantic import BaseModel, Field, field_validator


class DataSettings(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """Which samples are read, and how."""

    train: str | list[str] = ""
    """training shards: a folder, a glob, a brace pattern such as a-{000000..000011}.tar, or a list of these"""
    heldout: str | list[str] = ""
    """held-out shards that evaluation compares with, named in the same ways"""
    labelled: str | list[str] = ""
    """shards that the classifier of a demo's scores is trained on (default: those of `train`)"""
    resolution: int = Field(1024, ge=8)
    """side of the square training images, in pixels"""
    workers: int = Field(0, ge=0)
    """loader processes per rank; 0 reads in the training process"""
    image_keys: list[str] = ["png", "jpg", "jpeg", "webp"]
    """file extensions of images; the first that a sample has is read"""
    caption_key: str = "txt"
    """file extension of captions"""
    cached: Literal["auto", "off", "require"] = "auto"
    """encoded shards (`disback shards --encode`): "auto" trains on their latents and text if `train` names such shards,
    "require" refuses to train without everything that the stage can use, "off" reads captions and images only"""

    @field_validator("cached", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false
