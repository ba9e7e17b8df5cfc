"""Tables of a study: scores at equal compute, and compute to thresholds, with the spread over seeds."""

import math
import statistics

from benchmarks.convergence.recipes import Recipe
from benchmarks.convergence.scores import METRICS
from benchmarks.convergence.study import Part
from trainer.evaluation.costs import cost_to, spread

Curves = list[list[dict]]  # one per seed: points with compute and scores


def mean_at(curves: Curves, metric: str, place: int) -> float:
    """The mean over seeds at a point of the curves; places count from the end if negative."""
    return statistics.fmean(points[place][metric] for points in curves)


def best(curves: Curves, metric: str) -> float:
    """The best mean over seeds on the way."""
    return min(mean_at(curves, metric, place) for place in range(min(map(len, curves))))


def thresholds(base: Curves) -> dict[str, tuple[float, float]]:
    """Of each metric: what plain distillation has reached at half of its compute, and the best that it reaches."""
    half = (min(map(len, base)) - 1) // 2
    return {metric: (mean_at(base, metric, half), best(base, metric)) for metric in METRICS}


def method_table(part: Part, found: dict[str, Curves], chosen: dict[str, Recipe], base: str = "none") -> str:
    """A part's rows: scores at the end, and compute to `base`'s thresholds."""
    goals = thresholds(found[base])
    heads = ["", "rates", "FID", "pixel FD", "recall"]
    heads += [
        f"to {name} {goal:.3g}" for name, metric in (("FID", "fid"), ("FD", "pixel_fd")) for goal in goals[metric]
    ]
    rows = [heads, ["---"] * len(heads)]
    for label, curves in found.items():
        recipe = chosen[label]
        ends = [spread([points[-1][name] for points in curves]) for name in (*METRICS, "recall")]
        costs = [spread([cost_to(p, metric, goal) for p in curves]) for metric in METRICS for goal in goals[metric]]
        rows.append([label, f"{recipe.lr:g} / {recipe.fake_lr:g}", *ends, *costs])
    title = f"{part.problem}, {part.name}: {len(part.seeds)} seeds, compute {chosen[base].budget:g}"
    return f"{title}\n\n{lines(rows)}"


def pair_table(part: Part, found: dict[str, Curves]) -> str:
    """Plain distillation and the walk under each change: scores at the end, and the walk's gain in compute to the best mean
    score of plain distillation."""
    rows = [["", "FID none", "FID walk", "pixel FD none", "pixel FD walk", "gain FID", "gain pixel FD"]]
    rows.append(["---"] * len(rows[0]))
    for label in dict.fromkeys(name.rpartition(": ")[0] for name in found):
        none, walk = (found[f"{label}: {method}"] for method in ("none", "walk"))
        cells = [spread([p[-1][metric] for p in curves]) for metric in METRICS for curves in (none, walk)]
        for metric in METRICS:
            goal = best(none, metric)
            first, other = (statistics.fmean(cost_to(p, metric, goal) for p in curves) for curves in (none, walk))
            cells.append(gain(first, other))
        rows.append([label, *cells])
    return f"{part.problem}, {part.name}: {len(part.seeds)} seeds\n\n{lines(rows)}"


def gain(one: float, other: float) -> str:
    """How many times less compute the other needs."""
    if not math.isfinite(other):
        return "never there" if math.isfinite(one) else "neither"
    return f"{one / other:.2f}" if math.isfinite(one) else "only the walk"


def recipe_table(part: Part, found: dict[str, Curves], chosen: dict[str, Recipe]) -> str:
    """Compute that our recipe needs for the best scores that another one ever reaches."""
    heads = ["", "rate", "metric", "its best", "at compute", "ours gets there at", "share of its compute"]
    rows = [heads, ["---"] * len(heads)]
    for label in list(found)[:-1]:
        for metric in METRICS:
            other, ours = found[label], found["ours"]
            place = min(range(min(map(len, other))), key=lambda i: mean_at(other, metric, i))
            goal, theirs = mean_at(other, metric, place), statistics.fmean(points[place]["compute"] for points in other)
            costs = [cost_to(points, metric, goal) for points in ours]
            share = spread([cost / theirs for cost in costs]) if theirs else "it never improves"
            rows.append([label, f"{chosen[label].lr:g}", metric, f"{goal:.3g}", f"{theirs:.0f}", spread(costs), share])
    return f"{part.problem}, recipe: {len(part.seeds)} seeds\n\n{lines(rows)}"


def lines(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table(part: Part, found: dict[str, Curves], chosen: dict[str, Recipe]) -> str:
    if part.name == "recipe":
        return recipe_table(part, found, chosen)
    if part.name == "starts":
        return pair_table(part, found)
    return method_table(part, found, chosen, next(iter(found)))
