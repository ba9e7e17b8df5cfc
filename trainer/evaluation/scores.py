"""Metrics from rows of numbers per image, shared out over the ranks."""

from torch import Tensor

from models.image_metrics import (
    discrepancy,
    frechet_distance,
    gaussian_kernel_sums,
    inside,
    kernel_distances,
    radii,
)
from trainer.distributed.world import World, gather_rows, sum_over_ranks
from trainer.evaluation.classifier import as_shares
from trainer.evaluation.networks import COMPARED, FRECHET, SCORED
from trainer.evaluation.references import Reference, moments_of
from trainer.evaluation.rows import Rows

SUBSETS = 100  # of KID


def scores(
    rows: Rows, reference: Reference | None, metrics: tuple[str, ...], accuracies: tuple[str, ...], world: World
) -> dict[str, float]:
    """The metrics of generated images. Every rank must call it."""
    found: dict[str, float] = {}
    for metric in metrics:
        if metric in SCORED:
            found[metric] = float(rows.read(SCORED[metric]).double().mean())
        elif metric == "kid":
            found |= kid(rows, reference, world)
        elif metric == "precision_recall":
            found |= precision_recall(rows, reference, world)
        elif metric == "cmmd":
            found["cmmd"] = cmmd(rows, reference, world)
        elif metric in FRECHET or metric == "pixel_fd":
            block = COMPARED[metric]
            found[metric] = frechet_distance(moments_of(rows, block, world), reference.moments(block))
    if "clip_score" in found:
        found["clip_score_x100"] = 100 * found["clip_score"]
    if accuracies:
        found |= as_shares(rows.read("correct"), list(accuracies))
    return found


def kid(rows: Rows, reference: Reference, world: World) -> dict[str, float]:
    """Mean and standard deviation over the subsets; each rank computes its share of them."""
    which = range(world.rank, SUBSETS, world.size)
    sets = rows.read(COMPARED["kid"]), reference.rows.read(COMPARED["kid"])
    found = gather_rows(kernel_distances(*sets, which, subsets=SUBSETS, device=world.device).to(world.device), world)
    return {"kid": float(found.mean()), "kid_std": float(found.std(correction=0))}


def precision_recall(rows: Rows, reference: Reference, world: World) -> dict[str, float]:
    """The samples are shared out over the ranks, first for the radii of their balls, then to be looked for in the others'."""
    fake, real = (each.read(COMPARED["precision_recall"]) for each in (rows, reference.rows))
    place = {"device": world.device}

    def share(points: Tensor, centres: Tensor) -> float:
        sizes = gather_rows(radii(centres, _share(len(centres), world), **place), world)
        hits = inside(points, centres, sizes, _share(len(points), world), **place).double().sum()
        return float(sum_over_ranks(hits, world)) / len(points)

    return {"precision": share(fake, real), "recall": share(real, fake)}


def cmmd(rows: Rows, reference: Reference, world: World) -> float:
    """The rows of the kernel matrices are shared out over the ranks."""
    fake, real = rows.read("cmmd"), reference.rows.read("cmmd")
    shares = {"rows_x": _share(len(fake), world), "rows_y": _share(len(real), world)}
    sums = gaussian_kernel_sums(fake, real, **shares, device=world.device)
    return discrepancy(sum_over_ranks(sums, world), len(fake), len(real))


def _share(count: int, world: World) -> slice:
    """This rank's consecutive part of `count` samples."""
    return slice(count * world.rank // world.size, count * (world.rank + 1) // world.size)
