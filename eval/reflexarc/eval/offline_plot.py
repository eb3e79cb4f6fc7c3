"""One picture of an offline comparison: the error along the chunk, and by action dimension."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from reflexarc.eval.offline_summary import OfflineSummary, write_atomically
from reflexarc.eval.report_html.palette import LIGHT, LINES, MARKERS

_DOTS_PER_INCH = 130


def write_plot(summary: OfflineSummary, path: Path) -> None:
    """Write the picture atomically."""
    write_atomically(path, plot_png(summary))


def plot_png(summary: OfflineSummary) -> bytes:
    """A PNG: normalised MAE of each dimension by position, and the gripper's share of errors."""
    dimensions = [d for d in summary.total.dimensions if d.scale is not None]
    columns = [i for i, d in enumerate(summary.total.dimensions) if d.scale is not None]
    with_gripper = summary.total.gripper is not None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if with_gripper else 1, squeeze=False, width_ratios=None)[0]
    steps = [position.first for position in summary.positions]
    for number, (dimension, column) in enumerate(zip(dimensions, columns, strict=True)):
        scale = dimension.scale or 1.0
        axes[0].plot(
            steps,
            [position.dimension_mae[column] / scale for position in summary.positions],
            label=dimension.name,
            color=LIGHT.series[number % len(LIGHT.series)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=LINES[number % len(LINES)],
            markersize=3.5,
        )
    axes[0].set_ylabel("MAE / standard deviation")
    # Above the lines, which leave no room among themselves.
    axes[0].legend(
        ncols=3, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    if with_gripper:
        wrong = [
            100 * (1 - p.gripper.correct / p.gripper.total) if p.gripper else 0.0
            for p in summary.positions
        ]
        axes[1].plot(steps, wrong, color=LIGHT.series[0], marker="o", markersize=3.5)
        axes[1].set_ylabel("wrong gripper commands, %")
    for one in axes:
        one.set_xlabel("position in the chunk")
        one.set_ylim(bottom=0)
        one.grid(axis="y", color=LIGHT.grid)
        one.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{summary.total.episodes} episodes, checkpoint "
        f"{summary.identity.checkpoint_fingerprint[:12] or 'without fingerprint'}",
        fontsize=10,
    )
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return out.getvalue()
