"""The curves of a report, as PNG files in memory; None where no run has the metric."""

import io
import textwrap
import warnings
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # no screen on a cluster
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from trainer.evaluation.results import ProtocolId, Results
from trainer.evaluation.table import COLUMNS, Group, Table

COLOURS = {"path": "#0072b2", "warm": "#e69f00", "none": "#777777"}
MORE_COLOURS = ("#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#882255", "#999933")
MARKERS = "os^DvP*X"
UNITS = ("step", "GPU-hours", "compute, forward passes of a batch")
DISTANCES = ("fid", "patch_fid", "pixel_fd", "fd_dinov2", "cmmd", "kid")
LOG_RATIO = 30.0  # a distance that spans more than this has a logarithmic axis: else the start hides all later steps


def style(groups: list[Group], group: Group) -> tuple[str, str]:
    """Colour and marker of a group's curves: those of its kind, and others from the second group of the kind on."""
    place = next(i for i, other in enumerate(groups) if other is group)
    first = next(i for i, other in enumerate(groups) if other.kind == group.kind)
    colour = COLOURS[group.kind] if place == first else MORE_COLOURS[place % len(MORE_COLOURS)]
    return colour, MARKERS[place % len(MARKERS)]


def with_curves(groups: list[Group], protocol: ProtocolId, raw: bool = False) -> list[Group]:
    """The groups whose checkpoints (raw: their raw weights) were evaluated under a protocol during training."""
    return [group for group in groups if any(run.scores_over_steps(protocol, raw) for run in group.runs)]


def score_curves(groups: list[Group], table: Table, key: str) -> list[bytes]:
    """A score of the evaluated checkpoints over steps, over GPU-hours and over compute, the last two with the recording;
    only of evaluations under the table's protocol. Mean and standard deviation over the runs of a group; averaged weights
    solid, raw ones dashed; the teacher as a line, the start as a point, published numbers as thin lines. Empty if no run
    has it."""
    curves = {
        (number, raw): points
        for number, group in enumerate(groups)
        for raw in (False, True)
        if (points := _score_points(group, table.protocol, key, raw))
    }
    if not curves:
        return []
    rows = {row.label: row for row in table.rows if row.values[key] is not None}
    pictures = []
    for place, unit in enumerate(UNITS):
        axes = _axes(COLUMNS[key][0], unit)
        for (number, raw), points in curves.items():
            known = [(p[place], *p[3:]) for p in points if p[place] is not None]
            if known:
                _line(axes, style(groups, groups[number]), known, raw)
        if not axes.lines:
            plt.close(axes.figure)  # of no run is it known what it cost
            continue
        if "start" in rows:
            axes.plot(0, rows["start"].values[key], color="black", marker="s", markersize=5, linestyle="none")
        if "teacher" in rows:
            axes.axhline(rows["teacher"].values[key], color="black", linestyle=":", linewidth=1.2)
        published = sorted((v, r.label) for r in table.published if (v := r.values.get(key)) is not None)
        for i, (value, label) in enumerate(published):
            _published(axes, value, label, right=i % 2 == 1)
        _scale(axes, key)
        pictures.append(_encoded(axes.figure))
    return pictures


def _score_points(group: Group, protocol: ProtocolId, key: str, raw: bool) -> list[tuple]:
    """(step, GPU-hours, compute, mean, standard deviation) of each step that all of the group's evaluated runs have."""
    found = []
    for run in group.runs:
        steps = run.scores_over_steps(protocol, raw).items()
        points = {step: scores[key] for step, scores in steps if scores.get(key) is not None}
        if points:
            costs = {step: run.generator_cost(step) for step in points}
            found.append({s: (s, costs[s].gpu_hours, costs[s].compute, value) for s, value in points.items()})
    return _over_runs(found)


def _over_runs(found: list[dict[int, tuple]]) -> list[tuple]:
    """Per step that all runs have, the means of its values (None if one is None), and the sample standard deviation of the
    last value (0 for one run)."""
    points = []
    for step in sorted(set.intersection(*map(set, found))) if found else []:
        columns = list(zip(*(run[step] for run in found), strict=True))
        means = [None if None in column else float(np.mean(column)) for column in columns]
        points.append((*means, float(np.std(columns[-1], ddof=1)) if len(found) > 1 else 0.0))
    return points


def curves(
    groups: list[Group], stage: str, key: str, title: str, log: bool = False, marks: Sequence[int] = ()
) -> bytes | None:
    """A metric of a stage over its steps, one curve per group of runs. marks: steps to draw a vertical line at, such as
    those of the nodes."""
    axes = _axes(title, "step")
    for group in groups:
        found = [{s: (s, v) for s, v in zip(*run.curve(stage, key), strict=True)} for run in group.runs]
        points = _over_runs([run for run in found if run])
        if points:
            _line(axes, (style(groups, group)[0], "."), points, steps=key == "target_node")
    if not axes.lines:
        plt.close(axes.figure)
        return None
    for mark in marks:
        axes.axvline(mark, color="#d55e00", linewidth=0.8)
    if log:
        _logarithmic(axes)
    return _encoded(axes.figure)


def _line(axes: plt.Axes, look: tuple[str, str], points: list[tuple], raw: bool = False, steps: bool = False) -> None:
    """A curve through (x, mean, standard deviation), and a band where there is a deviation."""
    x, mean, std = (np.array(column) for column in zip(*points, strict=True))
    colour, marker = look
    axes.plot(
        x,
        mean,
        color=colour,
        marker=marker,
        markersize=4 if marker != "." else 3,
        linewidth=1.4,
        linestyle="--" if raw else "-",
        markerfacecolor="white" if raw else colour,
        drawstyle="steps-post" if steps else "default",
    )
    if std.any():
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)


def _published(axes: plt.Axes, value: float, label: str, right: bool) -> None:
    axes.axhline(value, color="#aa3377", linewidth=0.8, zorder=1.5)
    # In turns at the left above the line and at the right below it: the numbers are often close to each other.
    place, side, above = (0.99, "right", "top") if right else (0.01, "left", "bottom")
    text = textwrap.shorten(f"{label} {value:g}", 30, placeholder="...")
    look = {"fontsize": 10, "color": "#771155", "ha": side, "va": above, "zorder": 1, "parse_math": False}
    axes.text(place, value, text, transform=axes.get_yaxis_transform(), **look)


def _scale(axes: plt.Axes, key: str) -> None:
    """A logarithmic axis for distances that span orders of magnitude."""
    values = np.concatenate([np.atleast_1d(line.get_ydata()) for line in axes.lines])
    if key in DISTANCES and values.min() > 0 and values.max() > LOG_RATIO * values.min():
        _logarithmic(axes)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))


def _logarithmic(axes: plt.Axes) -> None:
    def plain(value: float, _: int) -> str:  # 0.1 instead of a power of ten in small print
        return f"{value:g}"

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())


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
        axes.set_title(textwrap.fill(prompt, 15), fontsize=7, parse_math=False)  # a caption may have a $
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    return _encoded(figure, dpi=110)


def _axes(title: str, unit: str) -> plt.Axes:
    """Axes for a picture of 3.5 inches that the page shows 350 pixels wide: 10.5 points are 14 to 15 pixels there."""
    axes = plt.subplots(figsize=(3.5, 2.5))[1]
    axes.set_title(title, fontsize=11.5)
    axes.set_xlabel(unit, fontsize=10.5)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=10.5)
    axes.locator_params(axis="x", nbins=5)
    return axes


def _encoded(figure: plt.Figure, dpi: int = 160) -> bytes:
    """A figure as a PNG file; closes it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of captions: the page has them as text
        figure.savefig(file, format="png", dpi=dpi, bbox_inches="tight")
    plt.close(figure)
    return file.getvalue()
