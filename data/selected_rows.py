"""The samples of a shard that a selection leaves, and their buckets."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from data.buckets import Size
from data.caption_source import CaptionSource
from data.errors import DataError
from data.filters import MEASURED, Filter
from data.rejects import LEFT_OUT
from data.selection import Selection
from data.shard_facts import ShardFacts, Wanted, load_facts
from data.shard_index import ShardIndex

NO_SIZE = "image size is not readable"


class NothingSelectedError(DataError):
    """The filters leave no sample. rejected: counts by reason."""

    def __init__(self, where: object, rejected: Counter):
        reasons = "; ".join(f"{count} x {reason}" for reason, count in rejected.items())
        super().__init__(f"no sample of {where} is left ({reasons}): change data.filters or data.min_size")
        self.rejected = rejected


def facts_wanted(selection: Selection, image_keys: list[str], captions: CaptionSource) -> Wanted:
    """The facts that a selection needs."""
    fields = [f.field for f in selection.filters]
    size = selection.buckets or selection.min_size or set(fields) & {"width", "height", "aspect"}
    return Wanted(
        tuple(image_keys) if size else (),
        captions if "caption_length" in fields else None,
        tuple(dict.fromkeys(field for field in fields if field not in MEASURED)),
    )


def select(
    selection: Selection, index: ShardIndex, rows: np.ndarray, image_keys: list[str], captions: CaptionSource
) -> tuple[np.ndarray, np.ndarray, Counter]:
    """Of these rows of a shard those that are read, int64 [M], their buckets, int16 [M], and counts of the others by
    reason. Raises DataError if the shard cannot be read."""
    wanted, rejects = facts_wanted(selection, image_keys, captions), Counter()
    if not wanted:
        return rows, np.zeros(len(rows), np.int16), rejects
    facts = load_facts(index, wanted)

    def keep(fulfilled: np.ndarray, reason: str) -> None:
        nonlocal rows
        rejects[reason] += int((~fulfilled[rows]).sum())
        rows = rows[fulfilled[rows]]

    if wanted.image_keys:
        keep(facts.sizes.min(axis=1) > 0, NO_SIZE)
    if selection.min_size:
        keep(facts.sizes.min(axis=1) >= selection.min_size, f"{LEFT_OUT}short side below {selection.min_size} pixels")
    for each in selection.filters:
        if each.field in MEASURED:
            keep(each.of_numbers(_measured(each.field, facts)), f"{LEFT_OUT}not {each}")
        else:
            has, fulfilled = facts.field(each.field).fulfilling(each)
            keep(has, f"{LEFT_OUT}no {_kind(each)} {each.field} for the filter {each}")
            keep(fulfilled, f"{LEFT_OUT}not {each}")
    buckets = (
        nearest_bucket(facts.sizes[rows], selection.buckets) if selection.buckets else np.zeros(len(rows), np.int16)
    )
    return rows, buckets, +rejects


def nearest_bucket(sizes: np.ndarray, shapes: Sequence[Size]) -> np.ndarray:
    """The number of the shape whose aspect ratio's logarithm is nearest to each image's, int16 [N]; of equally near ones the
    first. sizes: [N, 2], height and width."""
    ratios = np.log(np.asarray(sizes, np.float64)[:, 0]) - np.log(np.asarray(sizes, np.float64)[:, 1])
    best, distance = np.zeros(len(ratios), np.int16), np.full(len(ratios), np.inf)
    for number, (height, width) in enumerate(shapes):
        away = np.abs(ratios - (np.log(height) - np.log(width)))
        nearer = away < distance - 1e-12  # rounding must not decide between two equal shapes
        best[nearer], distance[nearer] = number, away[nearer]
    return best


def _measured(field: str, facts: ShardFacts) -> np.ndarray:
    if field == "caption_length":
        return facts.caption_lengths
    height, width = facts.sizes.T
    if field == "aspect":
        return np.maximum(height, width) / np.maximum(np.minimum(height, width), 1)
    return width if field == "width" else height


def _kind(each: Filter) -> str:
    return {bool: "true or false", float: "number", str: "text"}[type(each.literal)]
