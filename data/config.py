"""The `data` section of a run's configuration."""

from typing import Literal

from pydantic import BaseModel, Field, field_validator


class DataConfig(BaseModel, extra="forbid"):
    """train, heldout: shards as a folder, a glob, a brace pattern such as a-{000000..000011}.tar, or a list of these.
    resolution: side of the square training images in pixels. workers: loader processes a rank, 0 reads in the training
    process. image_keys: extensions of images, the first that a sample has is read. cached: encoded shards (`disback shards
    --encode`): "auto" trains on their latents and text if `train` names such, "require" refuses to train without all that
    the stage can use, "off" reads captions and images only."""

    train: str | list[str] = ""
    heldout: str | list[str] = ""
    resolution: int = Field(1024, ge=8)
    workers: int = Field(0, ge=0)
    image_keys: list[str] = ["png", "jpg", "jpeg", "webp"]
    caption_key: str = "txt"
    cached: Literal["auto", "off", "require"] = "auto"

    @field_validator("cached", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false
