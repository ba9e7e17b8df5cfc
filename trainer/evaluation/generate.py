"""Makes the rows of a set of images, chunk by chunk, on all ranks."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

from trainer.distributed.logs import duration, log
from trainer.distributed.world import World, barrier
from trainer.evaluation.rows import Rows
from trainer.training.preview import GREY

GRID = 60  # images of the grid
GRID_SIDE = 256  # their largest side
LINE_SECONDS = 10.0  # between progress lines


def fill(
    rows: Rows,
    world: World,
    images: Callable[[list[int]], list[Tensor]],
    measure: Callable[[list[Tensor], list[int]], dict[str, Tensor]],
    batch: int,
    name: str,
    show: bool = False,
    keep: Callable[[int, list[int], list[Tensor]], None] | None = None,
    canvas: tuple[int, int] | None = None,
) -> None:
    """Makes the chunks of `rows` that are missing. Every rank must call it.

    images: uint8 images, each [3, H, W], by number. measure: the blocks of a batch of images. batch: images per call.
    Within a chunk, batches do not depend on the ranks, so neither does the last bit of a row. show: also saves
    thumbnails of the first images, for the grid; canvas: height and width of all thumbnails, if they differ. keep: called with a chunk's
    number, its images' numbers and its images, before its rows count as made.
    """
    mine, began, shown = rows.missing(world), time.monotonic(), time.monotonic()
    total = sum(len(rows.images(number)) for number in mine)
    if world.main and rows.chunks > len(mine) * world.size:
        log.info(f"evaluate {name}: {rows.chunks - len(mine) * world.size} of {rows.chunks} chunks are there already")
    done = 0
    for number in mine:
        blocks, kept = [], []
        span = list(rows.images(number))
        for first in range(0, len(span), batch):
            part = span[first : first + batch]
            made = images(part)
            found = measure(made, part)
            if show and part[0] < GRID:
                found["shown"] = torch.stack([_centred(thumbnail(image), canvas) for image in made])
            blocks.append({block: values.cpu() for block, values in found.items()})
            kept += [image.cpu() for image in made] if keep else []
            done += len(part)
            if time.monotonic() - shown > LINE_SECONDS or done == total:
                shown = time.monotonic()
                left = (shown - began) / done * (total - done)
                log.info(f"evaluate {name}: {100 * done // total}% of {rows.total} images, ETA {duration(left)}")
        if keep:
            keep(number, span, kept)
        names = dict.fromkeys(block for part in blocks for block in part)
        rows.write(number, {block: torch.cat([part[block] for part in blocks if block in part]) for block in names})
    barrier(world)


def thumbnail_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image's thumbnail, of at most GRID_SIDE pixels."""
    scale = min(GRID_SIDE / max(size), 1)
    return round(size[0] * scale), round(size[1] * scale)


def canvas_of(sizes: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """Height and width that the thumbnails of images of these sizes fit into; None if all have one size."""
    different = set(sizes)
    fitted = [thumbnail_size(size) for size in different]
    return (max(h for h, _ in fitted), max(w for _, w in fitted)) if len(different) > 1 else None


def thumbnail(image: Tensor) -> Tensor:
    """A uint8 image [3, H, W], averaged down to `thumbnail_size`."""
    size = thumbnail_size(tuple(image.shape[1:]))
    if size == tuple(image.shape[1:]):
        return image.cpu()
    smaller = functional.interpolate(image[None].float(), size=size, mode="area")[0]
    return smaller.round().to(torch.uint8).cpu()


def _centred(image: Tensor, canvas: tuple[int, int] | None) -> Tensor:
    """An image [3, h, w] in the middle of a grey canvas."""
    if canvas is None:
        return image
    out = torch.full((3, *canvas), GREY, dtype=torch.uint8)
    top, left = (canvas[0] - image.shape[1]) // 2, (canvas[1] - image.shape[2]) // 2
    out[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return out


def grid_images(rows: Rows) -> list[Tensor]:
    """The first images, as thumbnails [3, h, w]."""
    found: list[Tensor] = []
    for number in range(rows.chunks):
        if rows.images(number).start >= GRID:
            break
        found += rows.chunk_block(number, "shown")
    return found[:GRID]
