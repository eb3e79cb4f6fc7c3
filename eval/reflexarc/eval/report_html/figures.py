"""Plots as SVG images: each for wide and narrow screens, for paper and dark.

An image cannot read the page's colours, so the page lists four versions of every plot and the
browser takes the one that fits (``<picture>``). The dark one is the same drawing, recoloured.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reflexarc.eval.report_html.palette import LIGHT, darkened, look

WIDE_INCHES, NARROW_INCHES = 10.9, 3.75
Draw = Callable[[Figure, bool], None]


@dataclass(frozen=True)
class Rate:
    """A rate with its interval, all in 0..1."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One named row of values; ``rates`` has None where there is nothing to show."""

    name: str
    rates: Sequence[Rate | None]


@dataclass(frozen=True)
class Curve:
    """Values ``x`` of ``total`` episodes; those not in ``x`` never got there."""

    name: str
    x: Sequence[float]
    total: int


@dataclass(frozen=True)
class Picture:
    """One plot as data URIs. ``alt`` says in words what it shows."""

    alt: str
    wide_light: str
    wide_dark: str
    narrow_light: str
    narrow_dark: str


def interval_plot(
    labels: Sequence[str], series: Sequence[Series], *, alt: str, x_label: str, signed: bool = False
) -> Picture:
    """Estimates with intervals, one line a label and series.

    Args:
        labels: of the rows, top to bottom.
        series: each with one rate a label.
        signed: the axis runs from -100 to 100 with a line at 0, instead of 0 to 100.
    """

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        spread = 0.62 if len(series) > 1 else 0.0
        for index, one in enumerate(series):
            offset = spread * (index / max(1, len(series) - 1) - 0.5)
            style = look(index)
            shown = [(y + offset, r) for y, r in enumerate(one.rates) if r is not None]
            estimates = [100 * r.estimate for _, r in shown]
            errors = [
                [max(0.0, 100 * (r.estimate - r.low)) for _, r in shown],
                [max(0.0, 100 * (r.high - r.estimate)) for _, r in shown],
            ]
            axes.errorbar(
                estimates,
                [y for y, _ in shown],
                xerr=errors,
                label=one.name,
                color=style.colour,
                fmt=style.marker,
                markersize=6,
                elinewidth=1.8,
                capsize=3,
                clip_on=False,
            )
        width = 22 if narrow else 40
        axes.set_yticks(range(len(labels)), ["\n".join(textwrap.wrap(t, width)) for t in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim((-100, 100) if signed else (0, 100))
        if signed:
            axes.axvline(0, color=LIGHT.ink, linewidth=1)
        for y in range(1, len(labels)):
            axes.axhline(y - 0.5, color=LIGHT.grid, linewidth=0.6)
        axes.grid(axis="x")
        axes.set_xlabel(x_label)
        _legend(figure, axes, len(series), narrow)

    rows = len(labels)
    height = 1.1 + rows * max(0.42, 0.2 * len(series))
    return _picture(draw, alt, height, height + 0.16 * rows + 0.2 * len(series))


def share_plot(
    curves: Sequence[Curve], *, alt: str, x_label: str, y_label: str, end: float | None = None
) -> Picture:
    """Share of episodes at or below each x, up to ``end`` (default: just past the last value)."""
    largest = max((max(curve.x) for curve in curves if curve.x), default=1.0)
    right = end if end is not None else largest * 1.04

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for index, curve in enumerate(curves):
            style = look(index)
            values = sorted(curve.x)
            shares = [100 * (n + 1) / curve.total for n in range(len(values))]
            axes.step(
                [0.0, *values, right],
                [0.0, *shares, shares[-1] if shares else 0.0],
                where="post",
                label=curve.name,
                color=style.colour,
                linestyle=style.line,
                linewidth=1.9,
                clip_on=False,
            )
        axes.set_xlim(0, right)
        axes.set_ylim(0, 100)
        axes.grid()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(figure, axes, len(curves), narrow)

    return _picture(draw, alt, 3.6, 3.2 + 0.2 * len(curves))


def _legend(figure: Figure, axes: Axes, count: int, narrow: bool) -> None:
    if count < 2:
        return
    # Above the plot, so that it never covers a value.
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=1 if narrow else min(count, 4),
        frameon=False,
        handlelength=2.8,
    )


def _picture(draw: Draw, alt: str, wide_height: float, narrow_height: float) -> Picture:
    wide = _render(draw, (WIDE_INCHES, wide_height), narrow=False)
    narrow = _render(draw, (NARROW_INCHES, narrow_height), narrow=True)
    return Picture(
        alt=alt,
        wide_light=_data_uri(wide),
        wide_dark=_data_uri(darkened(wide)),
        narrow_light=_data_uri(narrow),
        narrow_dark=_data_uri(darkened(narrow)),
    )


def _render(draw: Draw, inches: tuple[float, float], *, narrow: bool) -> str:
    """An SVG for paper, the same text every time."""
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 8.5 if narrow else 9.5,
        "text.color": LIGHT.ink,
        "text.parse_math": False,  # an instruction may hold a dollar sign
        "axes.edgecolor": LIGHT.ink,
        "axes.labelcolor": LIGHT.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": LIGHT.ink,
        "ytick.color": LIGHT.ink,
        "ytick.major.size": 0,
        "ytick.major.pad": 9,
        "grid.color": LIGHT.grid,
        "grid.linewidth": 0.8,
        "svg.fonttype": "path",
        "svg.hashsalt": "reflexarc",
    }
    out = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure, narrow)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
