"""The `data` section of a run's configuration."""

from pydantic import BaseModel, ConfigDict, Field


class DataSettings(BaseModel):
    """train, heldout: shards as a folder, a glob, a brace pattern such as shards/{00000..00127}.tar, or a list of them.
    resolution: side of the square training images, in pixels. workers: loader processes a rank; 0 reads in the
    training process."""

    model_config = ConfigDict(extra="forbid")

    train: str | list[str] = ""
    heldout: str | list[str] = ""
    resolution: int = Field(1024, ge=8)
    workers: int = Field(0, ge=0)
    image_keys: list[str] = ["png", "jpg", "jpeg", "webp"]
    caption_key: str = "txt"
