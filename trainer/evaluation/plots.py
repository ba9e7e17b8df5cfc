"""The curves of a report, as PNG files in memory; None where no run has the metric."""

import io
import textwrap
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # no screen on a cluster
import matplotlib.pyplot as plt
import numpy as np

from trainer.evaluation.results import Results

COLOURS = {"path": "#0072b2", "warm": "#e69f00", "none": "#777777"}


def curves(
    runs: list[Results], stage: str, key: str, title: str, log: bool = False, marks: Sequence[int] = ()
) -> bytes | None:
    """A metric of a stage, one curve per run. marks: steps to draw a vertical line at, such as those of the nodes."""
    axes = _axes(title, log)
    style = "steps-post" if key == "target_node" else "default"
    for run in runs:
        steps, values = run.curve(stage, key)
        if steps:
            axes.plot(
                steps, values, label=run.label, color=COLOURS[run.label], drawstyle=style, marker=".", markersize=3
            )
    has_data = bool(axes.lines)
    for mark in marks:
        axes.axvline(mark, color="#d55e00", linewidth=0.8)
    return _png(axes, has_data, legend=len(runs) > 1)


def evaluated(runs: list[Results], key: str, title: str) -> bytes | None:
    """An evaluation metric over checkpoints, one curve per run, from the untrained start on; the teacher's as a line."""
    axes = _axes(title)
    start, teacher = runs[0].evaluation("start"), runs[0].evaluation("teacher")
    for run in runs:
        points = [(step, scores[key]) for step, scores in run.evaluations_over_steps() if scores[key] is not None]
        if points and start and start[key] is not None:
            points = [(0, start[key]), *points]
        if points:
            axes.plot(*zip(*points, strict=True), label=run.label, color=COLOURS[run.label], marker="o", markersize=3)
    has_data = bool(axes.lines)
    if teacher and teacher[key] is not None:
        axes.axhline(teacher[key], color="black", linestyle=":", linewidth=1, label="teacher")
    return _png(axes, has_data)


def prompt_rows(run: Results) -> bytes | None:
    """Prompts as columns, and as rows what teacher, untrained generator and generator made of them; None before an
    evaluation of the generator with `sample.prompts`. A row of other prompts than the generator's is left out."""
    steps = f"{run.student_steps} steps" if run.student_steps > 1 else "one step"
    labels = {"teacher": "teacher,\n{} steps", "start": f"{steps},\nbefore", "generator": f"{steps},\nafter"}
    rows, found = {}, {what: run.prompt_images(what) for what in labels}
    if not found["generator"]:
        return None
    prompts = found["generator"][1]["prompts"]
    for what, label in labels.items():
        if found[what] and found[what][1]["prompts"] == prompts:
            file, settings = found[what]
            rows[label.format(settings["sampling_steps"])] = np.split(plt.imread(file), len(prompts), axis=1)
    figure, cells = plt.subplots(
        len(rows), len(prompts), figsize=(1.05 * len(prompts) + 1, 1.05 * len(rows) + 0.6), squeeze=False
    )
    for line, (label, images) in zip(cells, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, interpolation="nearest" if len(image) <= 64 else None)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axes, prompt in zip(cells[0], prompts, strict=True):
        axes.set_title(textwrap.fill(prompt, 15), fontsize=7)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    return _encoded(figure)


def _axes(title: str, log: bool = False) -> plt.Axes:
    axes = plt.subplots(figsize=(5.2, 3.1))[1]
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    if log:
        axes.set_yscale("log")
    return axes


def _png(axes: plt.Axes, has_data: bool, legend: bool = True) -> bytes | None:
    if not has_data:
        plt.close(axes.figure)
        return None
    if legend:
        axes.legend(fontsize=8)
    return _encoded(axes.figure)


def _encoded(figure: plt.Figure) -> bytes:
    """A figure as a PNG file; closes it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return file.getvalue()
