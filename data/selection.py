"""Which samples are read, and in which shape, as settings say it."""

from dataclasses import dataclass

from data.buckets import Size
from data.filters import Filter


@dataclass(frozen=True)
class Selection:
    """buckets: (height, width) in pixels; none for squares of one size. filters: what samples must fulfil. min_size: of the
    short side in pixels. random_crop, flip: how images are cut out of the resized one."""

    buckets: tuple[Size, ...] = ()
    filters: tuple[Filter, ...] = ()
    min_size: int = 0
    random_crop: bool = False
    flip: bool = False

    @property
    def selects(self) -> bool:
        """Whether samples may be left out."""
        return bool(self.filters or self.min_size)
