"""Curves of a study: both metrics over compute, mean and range over seeds, a row of panels per part."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from benchmarks.convergence.scores import METRICS
from benchmarks.convergence.study import Part
from benchmarks.convergence.tables import Curves

NAMES = {"fid": "FID", "pixel_fd": "pixel FD"}
COLOURS = {"none": "#555555", "warm": "#d98b00", "walk": "#1f6feb", "fine": "#7a3ea8", "blend": "#1a9850"}


def draw(found: list[tuple[Part, dict[str, Curves]]], file: Path) -> None:
    """Writes a PNG with the parts whose rows are the methods."""
    figure, axes = plt.subplots(len(found), 2, figsize=(9, 3 * len(found)), squeeze=False, layout="constrained")
    for row, (part, curves) in zip(axes, found, strict=True):
        for panel, metric in zip(row, METRICS, strict=True):
            for label, runs in curves.items():
                places = range(min(map(len, runs)))
                compute = [runs[0][i]["compute"] for i in places]
                values = [[points[i][metric] for points in runs] for i in places]
                middle = [sum(each) / len(each) for each in values]
                panel.plot(compute, middle, label=label, color=COLOURS.get(label))
                panel.fill_between(
                    compute, list(map(min, values)), list(map(max, values)), alpha=0.12, color=COLOURS.get(label), lw=0
                )
            panel.set(yscale="log", xlabel="compute (forward passes on 32 images)", ylabel=NAMES[metric])
            panel.set_title(f"{part.problem}, {part.name}: {len(part.seeds)} seeds", fontsize=10)
            panel.grid(alpha=0.3, which="both")
    axes[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=80)
    plt.close(figure)
