"""Aspect-ratio buckets: the shapes that training images are cropped to, as (height, width) in pixels."""

from collections.abc import Sequence

Size = tuple[int, int]  # height, width
LONGEST = 8  # times its short side is a bucket's long side at most
WIDEST = 2  # the same of a bucket that `auto_shapes` makes
AREA = 0.9  # of resolution^2 is the smallest area of these


def auto_shapes(resolution: int, step: int) -> list[Size]:
    """Shapes of at most resolution^2 pixels and nearly as many, with sides that are multiples of `step`, from 2:1 to 1:2,
    the square first: SDXL's list (Podell et al. 2023, appendix I) for 1024 and 64, without its longer half.

    Raises ValueError if the resolution is no multiple of the step.
    """
    if resolution % step:
        raise ValueError(f"resolution={resolution} is not a multiple of bucket_step={step}: change one of them")
    shapes = [(resolution, resolution)]
    for short in range(resolution - step, 0, -step):
        long = min(resolution**2 // short // step * step, WIDEST * short)
        if short * long >= AREA * resolution**2:
            shapes += [(short, long), (long, short)]
    return shapes


def check_shapes(shapes: Sequence[Size]) -> None:
    """Raises ValueError for a shape that is given twice, has no area or is very long."""
    for number, shape in enumerate(shapes):
        if min(shape) < 1 or max(shape) > LONGEST * min(shape):
            raise ValueError(f"bucket {list(shape)}: both sides must be positive, at most {LONGEST} times each other")
        if shape in shapes[:number]:
            raise ValueError(f"bucket {list(shape)} is given twice")
