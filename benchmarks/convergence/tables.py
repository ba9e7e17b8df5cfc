"""Tables of a study: scores at equal compute, and compute to thresholds, with the spread over seeds."""

import math
from statistics import fmean

from scipy.stats import ttest_rel

from benchmarks.convergence.diagnostics import NAMES as DIAGNOSTICS
from benchmarks.convergence.diagnostics import predictions
from benchmarks.convergence.recipes import Recipe
from benchmarks.convergence.scores import METRICS
from benchmarks.convergence.study import Part
from trainer.evaluation.costs import cost_to, mean_points, score_at, spread

Curves = list[list[dict]]  # one per seed: points with compute and scores


def paid(points: list[dict], recipe: Recipe) -> list[dict]:
    """Points with the untrained generator where the recording ends: until then nothing has improved."""
    if not recipe.records:
        return points
    return [points[0], points[0] | {"compute": recipe.recording_cost}, *points[1:]]


def best(curves: Curves, metric: str) -> tuple[float, float]:
    """The compute at which the mean curve is best, and its score there."""
    return min(((p["compute"], p[metric]) for p in mean_points(curves, metric)), key=lambda point: point[1])


def costs(curves: Curves, metric: str, goal: float) -> str:
    """Compute to a goal: of the mean curve, and in brackets how many of the runs get there by themselves."""
    cost = cost_to(mean_points(curves, metric), metric, goal)
    reached = sum(math.isfinite(cost_to(points, metric, goal)) for points in curves)
    return f"{cost:.0f} ({reached} of {len(curves)})" if math.isfinite(cost) else f"never ({reached} of {len(curves)})"


def goals(base: Curves, metric: str) -> tuple[float, float]:
    """What plain distillation has reached on the mean at half of its compute, and the best that it reaches."""
    mean = mean_points(base, metric)
    return score_at(mean, metric, mean[-1]["compute"] / 2), best(base, metric)[1]


def method_table(part: Part, found: dict[str, Curves], chosen: dict[str, Recipe], base: str) -> str:
    """A part's rows: scores at the end, compute to what `base` reaches, and how many times less that is than its own."""
    names = {"fid": "FID", "pixel_fd": "pixel FD"}
    wanted = [(metric, goal) for metric in METRICS for goal in goals(found[base], metric)]
    heads = ["", "rates", "FID", "pixel FD", "recall"]
    heads += [part for metric, goal in wanted for part in (f"to {names[metric]} {goal:.3g}", "gain")]
    rows = [heads, ["---"] * len(heads)]
    for label, curves in found.items():
        recipe = chosen[label]
        row = [label, f"{recipe.lr:g} / {recipe.fake_lr:g}"]
        row += [spread([points[-1][name] for points in curves]) for name in (*METRICS, "recall")]
        for metric, goal in wanted:
            first, own = (cost_to(mean_points(each, metric), metric, goal) for each in (found[base], curves))
            row += [costs(curves, metric, goal), gain(first, own)]
        rows.append(row)
    title = f"{part.problem}, {part.name}: {len(part.seeds)} seeds, compute {chosen[base].budget:g}"
    return f"{title}\n\n{lines(rows)}"


def walk_share(regime: str, none: Curves, walk: Curves) -> list[str]:
    """A row of the overview: both at the end, the walk's gain in compute to the best mean score of plain distillation, and
    whether it ends better or worse (t test at 5% on the differences of both under each seed, which have noise and captions in
    common)."""
    cells = [regime, str(len(none))]
    for metric in METRICS:
        one, other = ([points[-1][metric] for points in curves] for curves in (none, walk))
        first, goal = best(none, metric)
        verdict = "level"
        if len(one) > 1 and ttest_rel(other, one).pvalue < 0.05:
            verdict = "better" if fmean(other) < fmean(one) else "worse"
        reached = gain(first, cost_to(mean_points(walk, metric), metric, goal))
        cells += [spread(one), spread(other), verdict, reached]
    return cells


def shares(part: Part, found: dict[str, Curves]) -> list[list[str]]:
    """The overview's rows of a part: of its methods, or of each change of the recipe."""
    if {"none", "walk"} <= found.keys():
        return [walk_share(f"{part.problem}, {part.name}", found["none"], found["walk"])]
    labels = dict.fromkeys(name.rpartition(": ")[0] for name in found if name.endswith(": walk"))
    return [walk_share(f"{part.problem}, {k}", found[f"{k}: none"], found[f"{k}: walk"]) for k in labels]


def overview(rows: list[list[str]]) -> str:
    """What the walk gives over plain distillation at equal compute, in every regime."""
    heads = ["", "seeds", "FID none", "walk", "", "gain", "pixel FD none", "walk", "", "gain"]
    return lines([heads, ["---"] * len(heads), *rows])


def diagnostics_table(part: Part, found: dict[str, Curves]) -> str:
    """Rank correlations of what is measured during training with what the scores do next, over all rows and seeds."""
    heads = ["", "FID's next change", "pixel FD's next change", "final FID", "final pixel FD"]
    rows = [heads, ["---"] * len(heads)]
    for name, values in predictions([points for curves in found.values() for points in curves], METRICS).items():
        rows.append([DIAGNOSTICS[name], *("-" if math.isnan(value) else f"{value:+.2f}" for value in values)])
    return f"{part.problem}, diagnostics: {len(found)} rows, {len(part.seeds)} seeds\n\n{lines(rows)}"


def gain(one: float, other: float) -> str:
    """How many times less compute the other needs."""
    if not math.isfinite(other):
        return "-"
    return f"{one / other:.2f}" if other else "1.00"


def recipe_table(part: Part, found: dict[str, Curves], chosen: dict[str, Recipe]) -> str:
    """Compute that our recipe needs for the best mean scores that another one ever reaches."""
    ours = [label for label in found if label.startswith("ours")]
    rows = [["", "rate", "metric", "its best", "at compute", *(f"{label} gets there at (share)" for label in ours)]]
    rows.append(["---"] * len(rows[0]))
    for label in [label for label in found if label not in ours]:
        for metric in METRICS:
            theirs, goal = best(found[label], metric)
            row = [label, f"{chosen[label].lr:g}", metric, f"{goal:.3g}", f"{theirs:.0f}"]
            for mine in ours:
                own = [cost_to(points, metric, goal) for points in found[mine]]
                row.append(
                    f"{spread(own)} ({spread([cost / theirs for cost in own], 2) if theirs else 'it never improves'})"
                )
            rows.append(row)
    return f"{part.problem}, recipe: {len(part.seeds)} seeds\n\n{lines(rows)}"


def lines(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_recordings(found: dict[str, Curves], chosen: dict[str, Recipe]) -> dict[str, Curves]:
    """A part's runs as the tables take them: see `paid`."""
    return {label: [paid(points, chosen[label]) for points in curves] for label, curves in found.items()}


def table(part: Part, found: dict[str, Curves], chosen: dict[str, Recipe]) -> str:
    """A part's table as Markdown. found: with the recordings."""
    if part.name == "recipe":
        return recipe_table(part, found, chosen)
    if part.name in ("starts", "settings"):
        return f"{part.problem}, {part.name}: {len(part.seeds)} seeds\n\n{overview(shares(part, found))}"
    if part.name == "diagnostics":
        return f"{diagnostics_table(part, found)}\n\n{method_table(part, found, chosen, next(iter(found)))}"
    return method_table(part, found, chosen, next(iter(found)))
