"""The curves of a report, as PNG bytes."""

import io

import matplotlib

matplotlib.use("Agg")  # no screen on a cluster
import matplotlib.pyplot as plt

from trainer.evaluation.results import Results

COLOURS = {"path": "#0072b2", "warm": "#e69f00", "none": "#777777"}


def _png(figure: plt.Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return file.getvalue()


def _axes(title: str, x: str, log: bool = False) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(5.2, 3.1))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    if log:
        axes.set_yscale("log")
    return figure, axes


def compared(runs: list[Results], stage: str, key: str, title: str, log: bool = False) -> bytes | None:
    """One metric of a stage for every run that has it."""
    figure, axes = _axes(title, "step", log)
    for run in runs:
        steps, values = run.curve(stage, key)
        if steps:
            drawn = "steps-post" if key == "target_node" else "default"
            axes.plot(
                steps, values, label=run.label, color=COLOURS[run.label], drawstyle=drawn, marker=".", markersize=3
            )
    return _finish(figure, axes)


def evaluated(runs: list[Results], key: str, title: str) -> bytes | None:
    """An evaluation metric over checkpoints for every run that has one, with the teacher's as a line."""
    figure, axes = _axes(title, "step")
    for run in runs:
        points = [(step, scores[key]) for step, scores in run.evaluations_over_steps() if scores[key] is not None]
        start = runs[0].evaluation("start")
        if points and start and start[key] is not None:
            points = [(0, start[key]), *points]
        if points:
            axes.plot(*zip(*points, strict=True), label=run.label, color=COLOURS[run.label], marker="o", markersize=3)
    teacher = runs[0].evaluation("teacher")
    if axes.lines and teacher and teacher[key] is not None:
        axes.axhline(teacher[key], color="black", linestyle=":", linewidth=1, label="teacher")
    return _finish(figure, axes)


def single(
    run: Results, stage: str, key: str, title: str, log: bool = False, marks: list[int] | None = None
) -> bytes | None:
    """One metric of one run; marks: steps to mark (recorded nodes)."""
    figure, axes = _axes(title, "step", log)
    steps, values = run.curve(stage, key)
    if steps:
        axes.plot(steps, values, color=COLOURS["path"], marker=".", markersize=3)
    for mark in marks or []:
        axes.axvline(mark, color="#d55e00", linewidth=0.8)
    return _finish(figure, axes, legend=False)


def _finish(figure: plt.Figure, axes: plt.Axes, legend: bool = True) -> bytes | None:
    if not axes.lines:
        plt.close(figure)
        return None
    if legend:
        axes.legend(fontsize=8)
    return _png(figure)
