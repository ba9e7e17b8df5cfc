"""The `data` section of a run's configuration."""

from pydantic import BaseModel, Field


class DataConfig(BaseModel, extra="forbid"):
    """train, heldout: shards as a folder, a glob, a brace pattern such as a-{000000..000011}.tar, or a list of these.
    resolution: side of the square training images in pixels. workers: loader processes a rank, 0 reads in the training
    process. image_keys: extensions of images, the first that a sample has is read."""

    train: str | list[str] = ""
    heldout: str | list[str] = ""
    resolution: int = Field(1024, ge=8)
    workers: int = Field(0, ge=0)
    image_keys: list[str] = ["png", "jpg", "jpeg", "webp"]
    caption_key: str = "txt"
