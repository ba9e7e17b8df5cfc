"""What a score costs: compute to a threshold, and scores at equal compute, of runs and of their spread over seeds. No torch."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[dict]  # of one run, in order: "compute" and scores


def _between(low: float, high: float, share: float) -> float:
    """On the straight line of the logarithms, if they have some."""
    if low > 0 and high > 0:
        return low * (high / low) ** share
    return low + share * (high - low)


def cost_to(points: Points, metric: str, threshold: float, axis: str = "compute") -> float:
    """Cost at which a score first falls to a threshold, between two points by the logarithm of the score; infinite if it
    never does."""
    if points and points[0][metric] <= threshold:
        return points[0][axis]
    for before, after in pairwise(points):
        if after[metric] <= threshold:
            one, goal, other = before[metric], threshold, after[metric]
            if min(one, goal, other) > 0:
                one, goal, other = math.log(one), math.log(goal), math.log(other)
            return before[axis] + (one - goal) / (one - other) * (after[axis] - before[axis])
    return math.inf


def score_at(points: Points, metric: str, cost: float, axis: str = "compute") -> float:
    """A score at a cost between two points; that of the last point beyond the end, NaN before the first point."""
    if not points or cost < points[0][axis]:
        return math.nan
    for before, after in pairwise(points):
        if cost <= after[axis]:
            share = (cost - before[axis]) / (after[axis] - before[axis])
            return _between(before[metric], after[metric], share)
    return points[-1][metric]


def mean_points(runs: Sequence[Points], metric: str, axis: str = "compute") -> list[dict]:
    """The mean curve of several runs over the costs that all of them have reached; empty if there are none."""
    low, high = max(points[0][axis] for points in runs), min(points[-1][axis] for points in runs)
    costs = sorted({point[axis] for points in runs for point in points if low <= point[axis] <= high})
    return [
        {axis: cost, metric: statistics.fmean(score_at(points, metric, cost, axis) for points in runs)}
        for cost in costs
    ]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and sample standard deviation of the finite values, and how many they are if not all."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "never"
    text = f"{statistics.fmean(finite):#.{digits}g}".rstrip(".")
    if len(finite) > 1:
        text += f" +- {statistics.stdev(finite):.2g}"
    return text if len(finite) == len(values) else f"{text} ({len(finite)} of {len(values)})"
