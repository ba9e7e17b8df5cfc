"""`disback compare RUN...`: what scores cost, over seeds and at equal compute. No torch, no process group."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from trainer.entry import Parser, exit_with, guarded
from trainer.errors import UserError
from trainer.evaluation.costs import cost_to, mean_points, score_at, spread
from trainer.evaluation.results import ProtocolId, Results, one_line
from trainer.evaluation.table import COLUMNS, Group, group_runs, main_protocol

LOWER_IS_BETTER = ("fid", "patch_fid", "pixel_fd", "fd_dinov2", "cmmd")
AXES = ("compute", "gpu_hours")


@dataclass(frozen=True)
class Curves:
    """The scored checkpoints of each of a group's runs, by cost."""

    group: Group
    points: list[list[dict]]

    @classmethod
    def of(cls, group: Group, protocol: ProtocolId) -> "Curves":
        return cls(group, [_points(run, protocol) for run in group.runs])

    def shared(self, axis: str) -> float:
        """The cost that every run has reached."""
        return min(points[-1][axis] for points in self.points)


def _points(run: Results, protocol: ProtocolId) -> list[dict]:
    """A run's scores by cost, recording included. Raises UserError for fewer than two of them, or unknown costs."""
    scores = run.scores_over_steps(protocol)
    known = run.generator_scores()
    if known and known[1] == "generator" and ProtocolId.of(known[2]) == protocol:
        scores |= {known[0]: known[2]}
    points = []
    for step in sorted(scores):
        cost = run.generator_cost(step)
        if cost.compute is None or cost.gpu_hours is None:
            raise UserError(f"{run.folder}: what its path cost is not known: keep the run that recorded it beside it")
        points.append({"compute": cost.compute, "gpu_hours": cost.gpu_hours, **scores[step]})
    if len(points) < 2:
        raise UserError(
            f"{run.folder}: {len(points)} scored checkpoints under protocol {protocol}, and a curve needs two: train with "
            "backtrack.loop.keep_weights_every, then run `disback evaluate --watch`"
        )
    return points


def _goals(base: list[dict], metric: str, axis: str, wanted: list[float]) -> list[float]:
    """The thresholds that were asked for, or what the base's mean curve has reached at half of its cost, and its best."""
    if wanted:
        return wanted
    half = score_at(base, metric, max(base[-1][axis] / 2, base[0][axis]), axis)
    return sorted({half, min(point[metric] for point in base)}, reverse=True)


def table(curves: list[Curves], metric: str, axis: str, wanted: list[float]) -> str:
    """A metric's table as text: the score at the cost that all groups have reached, each run's cost to each threshold, and how
    many times less the mean curve's is than the first group's."""
    equal, means = (
        min(each.shared(axis) for each in curves),
        [mean_points(each.points, metric, axis) for each in curves],
    )
    if not all(means):
        raise UserError(
            f"the runs of a group have no {axis} in common: score more checkpoints, or compare by another --axis"
        )
    goals = _goals(means[0], metric, axis, wanted)
    head = COLUMNS[metric][0]
    rows = [["", "seeds", f"{head} at {equal:.4g}", *(part for goal in goals for part in (f"to {goal:.3g}", "gain"))]]
    for each, mean in zip(curves, means, strict=True):
        row = [each.group.label, str(len(each.points))]
        row.append(spread([score_at(points, metric, equal, axis) for points in each.points]))
        for goal in goals:
            row.append(spread([cost_to(points, metric, goal, axis) for points in each.points]))
            row.append(_gain(cost_to(means[0], metric, goal, axis), cost_to(mean, metric, goal, axis)))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _gain(first: float, other: float) -> str:
    return "-" if math.inf in (first, other) else f"{first / max(other, 1e-12):.2f}x"


def compare(argv: list[str]) -> None:
    parser = Parser(
        prog="disback compare",
        description="What scores cost, over seeds and at equal compute: runs that differ only in their seed are one row, and "
        "the first row is what the others are measured against.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--metrics", nargs="+", choices=LOWER_IS_BETTER, default=[], help="default: all that are there")
    parser.add_argument("--to", nargs="+", type=float, default=[], help="thresholds of a single metric")
    parser.add_argument("--axis", choices=AXES, default="compute", help="cost in forward passes or device-hours")
    parser.add_argument("--folder", help="name of the folder with the evaluations (default: evaluate.folder)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")
    args = parser.parse_intermixed_args(argv)
    if args.to and len(args.metrics) != 1:
        raise UserError("--to are thresholds of one metric: name it with --metrics")
    first = Results(args.runs[0], args.folder)
    runs = [first, *(Results(folder, args.folder, first.unit) for folder in args.runs[1:])]
    protocol = main_protocol(first)
    curves = [Curves.of(group, protocol) for group in group_runs(runs)]
    points = [point for each in curves for run in each.points for point in run]
    metrics = args.metrics or [m for m in LOWER_IS_BETTER if all(point.get(m) is not None for point in points)]
    if missing := [metric for metric in metrics if any(point.get(metric) is None for point in points)]:
        raise UserError(
            f"not every scored checkpoint has {', '.join(missing)}: leave it out, or evaluate it everywhere"
        )
    unit = f"forward passes on {first.unit} images" if args.axis == "compute" else "device-hours"
    print(f"protocol {protocol}; cost in {unit}, recordings included; mean +- standard deviation over seeds")
    for metric in metrics:
        print(f"\n{one_line(COLUMNS[metric][0])}\n{table(curves, metric, args.axis, args.to)}")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return guarded(lambda: compare(argv), "--debug" in argv)


if __name__ == "__main__":
    exit_with(main)
