"""What generated images are compared with, and the prompts that they are made of."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from data.errors import DataError
from data.prompts import Prompt, read_prompts
from data.reference_images import ReferenceImages, is_legacy, read_statistics
from data.shard_dataset import SampleError, ShardDataset
from data.shard_patterns import expand
from data.sources import names_prompts, prompt_field
from models.image_metrics import Moments, PixelComponents, Statistics
from trainer.distributed.logs import log
from trainer.distributed.world import World, from_main, sum_over_ranks
from trainer.errors import UserError
from trainer.evaluation.classifier import to_bytes
from trainer.evaluation.protocols import Protocol
from trainer.evaluation.rows import Rows
from trainer.path.manifest import file_hash
from trainer.training.run import Run
from trainer.training.shard_files import prepare_shards

MOMENTS_ROWS = 1024  # summed at a time: D x D sums of a few rows would take longer than their product


@dataclass(frozen=True)
class RealImages:
    """Real images by number, and what they are. image: uint8 [3, H, W]. identity: changes with the files. credit: whom they
    are from, if known."""

    name: str
    identity: str
    count: int
    image: Callable[[int], Tensor]
    credit: str | None = None


@dataclass(frozen=True)
class RealStatistics:
    """Mean and covariance of an .npz file, instead of images."""

    name: str
    identity: str
    statistics: Statistics


@dataclass
class Reference:
    """Real images as rows of numbers, or as statistics of the feature network only."""

    name: str
    rows: Rows | None
    world: World
    statistics: Statistics | None = None
    credit: str | None = None
    _moments: dict[str, Moments] = field(default_factory=dict)

    def moments(self, block: str) -> Moments | Statistics:
        """The moments of a block, read once. The first call for a block is collective."""
        if self.statistics:
            return self.statistics
        if block not in self._moments:
            if block == "pixels":
                self._moments[block] = Moments.of(self.components.project(self.rows.read(block)))
            else:
                self._moments[block] = moments_of(self.rows, block, self.world)
        return self._moments[block]

    @cached_property
    def components(self) -> PixelComponents:
        """Those of rank 0: other processors may find other signs and, for directions of equal variance, other bases."""
        return from_main(PixelComponents.fit(self.rows.read("pixels")) if self.world.main else None, self.world)

    @property
    def label(self) -> str:
        return f"{self.name} ({self.rows.total} images)" if self.rows else f"{self.name} (statistics)"


def moments_of(rows: Rows, block: str, world: World) -> Moments:
    """The moments of a block, each rank summing its share of the chunks: nothing is gathered. Every rank must call it."""
    total = Moments.of(torch.empty(0, rows.width(block), device=world.device))
    parts = rows.parts(block, world.rank, world.size)
    while some := list(itertools.islice(parts, max(1, MOMENTS_ROWS // rows.chunk))):
        total = total + Moments.of(torch.cat(some).to(world.device))
    return Moments(sum_over_ranks(total.stack, world), total.size)


def heldout(run: Run) -> tuple[ShardDataset, dict[int, dict]]:
    """The held-out samples, and the captions and .json of the usable ones by row."""
    if not run.settings.data.heldout:
        raise UserError(
            "data.heldout is empty: name held-out shards, or set evaluate.prompts and evaluate.reference to captions and "
            "real images"
        )
    if names_prompts(run.settings.data.heldout, "data.heldout"):
        raise UserError(
            f"data.heldout={run.settings.data.heldout} holds prompts alone, but this evaluation compares with real images: set "
            "evaluate.reference to them, or name held-out shards"
        )
    prepare_shards(run, "heldout")
    dataset = run.dataset("heldout", ("image", "caption", "meta"))
    texts = dataset.texts()
    if not texts:
        raise DataError(f"data.heldout has no usable sample ({dict(dataset.rejected)}): name other shards")
    if dataset.rejected and run.world.main:
        log.warning(f"skips samples of data.heldout: {dict(dataset.rejected)}")
    return dataset, texts


def heldout_images(run: Run) -> RealImages:
    """The held-out shards, cropped and resized as for training."""
    dataset, texts = heldout(run)
    rows, metas = list(texts), [text["meta"] for text in texts.values()]
    credits = sorted({str(meta["credit"]) for meta in metas if meta.get("credit")})
    return RealImages(
        str(run.settings.data.heldout),
        f"{ReferenceImages(dataset.paths, image_keys=run.settings.data.image_keys).identity} at {_selection(run, dataset)}",
        len(rows),
        lambda number: to_bytes(_read(dataset, rows[number])["image"]),
        "; ".join(credits[:3]) or None,
    )


def _selection(run: Run, dataset: ShardDataset) -> str:
    """Which of the shards' samples are read, and in which shapes."""
    data, text = run.settings.data, str(dataset.resolution)
    if data.buckets:
        text += f" in {[list(shape) for shape in data.shapes]}"
    return text + (f" of {data.filters} {data.min_size}" if data.selection.selects else "")


def _read(dataset: ShardDataset, row: int) -> dict:
    try:
        return dataset.read(row)
    except SampleError as reason:
        shard, key = dataset.locate(row)
        raise DataError(
            f"data.heldout: shard {shard}, key {key}: {reason}: remove this sample, or repair it"
        ) from reason


def find_reference(run: Run, protocol: Protocol) -> RealImages | RealStatistics:
    """The real images of `evaluate.reference`, or the held-out shards. Raises UserError and DataError."""
    where = run.settings.evaluate.reference
    if not where and protocol.reference == "heldout":
        return heldout_images(run)
    if not where:
        raise UserError(
            f"protocol {protocol.name} compares with real images: set evaluate.reference to their folder ({protocol.about})"
        )
    if where.endswith(".npz"):
        file = Path(where)
        if protocol.reference == "folder":
            raise UserError(
                f"{file}: protocol {protocol.name} has no statistics file: name the folder of its real images"
            )
        if is_legacy(file) and not (protocol.resize == "pytorch" and "legacy_pytorch" in file.name):
            raise UserError(
                f"{file}: was made with another resize than evaluate.resize={protocol.resize}: use the file of mode clean, or "
                "evaluate.resize=pytorch for legacy_pytorch"
            )
        mean, covariance = read_statistics(file)
        return RealStatistics(where, f"{file.name} {file_hash(file)}", Statistics(mean, covariance))
    folder = Path(where)
    shards = None if folder.is_dir() and not any(folder.glob("*.tar")) else expand(where, "evaluate.reference")
    # One rank looks at the files: tens of thousands, for COCO.
    images = from_main(_images(shards or folder, run) if run.world.main else None, run.world)
    return RealImages(where, images.identity, len(images), images.__getitem__)


def _images(source: Path | list[Path], run: Run) -> ReferenceImages:
    images = ReferenceImages(source, image_keys=run.settings.data.image_keys)
    _ = images.identity  # goes to the other ranks with the rest
    return images


def find_prompts(run: Run, protocol: Protocol) -> list[Prompt]:
    """The prompts of `evaluate.prompts`, or the held-out captions with their .json and bucket. Raises UserError and DataError."""
    settings = run.settings.evaluate
    if settings.prompts:
        return read_prompts(Path(settings.prompts), settings.prompt_key)
    if protocol.reference == "folder":
        raise UserError(
            f"protocol {protocol.name} has prompts of its own: set evaluate.prompts to them ({protocol.about})"
        )
    if names_prompts(run.settings.data.heldout, "data.heldout"):
        files = expand(run.settings.data.heldout, "data.heldout")
        prompts = [prompt for file in files for prompt in read_prompts(file, prompt_field(run.settings.data))]
        return [replace(prompt, id=f"{number:05d}") for number, prompt in enumerate(prompts)]
    dataset, texts = heldout(run)
    sizes = {row: dataset.size(row) if run.settings.data.buckets else None for row in texts}
    return [Prompt(text["caption"], f"{row:05d}", text["meta"], sizes[row]) for row, text in texts.items()]
