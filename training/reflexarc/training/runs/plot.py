"""A picture of one run or several: losses, learning rate, where the time goes, gradients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reflexarc.contract.errors import ConfigError
from reflexarc.training.runs.overview import read_overview, require_run

_COLORS = ("#2a6f97", "#d1495b", "#3a7d44", "#8d6a9f", "#c77d16", "#4a4a4a", "#1b998b", "#a44a3f")
_PARTS = ("data", "forward", "backward", "optimizer", "other")
_PART_COLORS = ("#c77d16", "#2a6f97", "#3a7d44", "#8d6a9f", "#9a9a9a")
_LOSS, _NORM = "total", "gradient_norm"


@dataclass(frozen=True)
class Curves:
    """What a run reported.

    Attributes:
        label: of the run in legends.
        train, validation: metric to ``float64 (N, 2)``, step and value.
        best_metric: the metric that chooses the best checkpoint, where it is known.
    """

    label: str
    train: Mapping[str, np.ndarray]
    validation: Mapping[str, np.ndarray]
    best_metric: str | None


def read_curves(folder: Path) -> Curves:
    """Read a run's ``metrics.jsonl``; ConfigError when it holds no line of training yet."""
    run = require_run(folder)
    kinds: dict[str, dict[str, list[tuple[float, float]]]] = {"train": {}, "validation": {}}
    text = run.metrics.read_text(encoding="utf-8") if run.metrics.is_file() else ""
    for line in text.splitlines():
        try:
            values = json.loads(line)
            metrics = kinds[values.pop("kind")]
            step = float(values.pop("step"))
        except (ValueError, KeyError, AttributeError, TypeError):
            continue  # a line that a kill cut short
        for name, value in values.items():
            if isinstance(value, int | float):
                metrics.setdefault(name, []).append((step, float(value)))
    if not kinds["train"]:
        raise ConfigError(f"{run.metrics} holds no line of training yet", field="run")
    overview = read_overview(folder)
    tables = {kind: {n: np.array(rows) for n, rows in m.items()} for kind, m in kinds.items()}
    return Curves(folder.absolute().name, tables["train"], tables["validation"],
                  overview.best_metric)  # fmt: skip


def draw(runs: Sequence[Curves]) -> Figure:
    """Six panels; every run has its own colour in all of them."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    colors = [_COLORS[place % len(_COLORS)] for place in range(len(runs))]
    _losses(axes[0, 0], runs, colors)
    _best_metric(axes[0, 1], runs, colors)
    _lines(axes[0, 2], runs, colors, "learning_rate", "learning rate")
    _time_split(axes[1, 0], runs, colors)
    _gradients(axes[1, 1], runs, colors)
    _lines(axes[1, 2], runs, colors, "samples_per_second", "samples/s")
    if len(runs) > 1:
        handles = [axes[0, 2].plot([], [], color=c, label=r.label)[0]
                   for r, c in zip(runs, colors, strict=True)]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 3))
    else:
        figure.suptitle(runs[0].label)
    return figure


def _losses(axes: Axes, runs: Sequence[Curves], colors: Sequence[str]) -> None:
    positive = True
    for run, color in zip(runs, colors, strict=True):
        for curves, style in ((run.train, "-"), (run.validation, "--")):
            if _LOSS in curves:
                steps, values = curves[_LOSS].T
                marker = "o" if style == "--" or len(steps) == 1 else None
                axes.plot(steps, values, style, color=color, marker=marker, markersize=3, lw=1.2)
                positive = positive and bool((values > 0).all())
    axes.plot([], [], "-", color="#4a4a4a", label="training")
    axes.plot([], [], "--o", color="#4a4a4a", markersize=3, label="held out")
    axes.legend(frameon=False)
    _finish(axes, "loss", log=positive)


def _best_metric(axes: Axes, runs: Sequence[Curves], colors: Sequence[str]) -> None:
    drawn = []
    for run, color in zip(runs, colors, strict=True):
        if run.best_metric is not None and run.best_metric in run.validation:
            steps, values = run.validation[run.best_metric].T
            axes.plot(steps, values, "-o", color=color, markersize=3, lw=1.2)
            best = int(values.argmin())
            axes.plot(steps[best], values[best], "*", color=color, markersize=12)
            drawn.append(run.best_metric)
    title = ", ".join(dict.fromkeys(drawn))
    _finish(axes, f"held out: {title} (star: best)" if drawn else "held out", empty=not drawn)


def _lines(
    axes: Axes, runs: Sequence[Curves], colors: Sequence[str], name: str, title: str
) -> None:
    for run, color in zip(runs, colors, strict=True):
        if name in run.train:
            steps, values = run.train[name].T
            axes.plot(steps, values, color=color, lw=1.2, marker="o" if len(steps) == 1 else None)
    _finish(axes, title, empty=not any(name in run.train for run in runs))


def _time_split(axes: Axes, runs: Sequence[Curves], colors: Sequence[str]) -> None:
    """One bar a run: mean milliseconds of a step by part."""
    timed = [
        (run, color)
        for run, color in zip(runs, colors, strict=True)
        if any(f"time/{part}" in run.train for part in _PARTS)
    ]
    left = np.zeros(len(timed))
    for part, part_color in zip(_PARTS, _PART_COLORS, strict=True):
        width = np.array([_mean_milliseconds(run, part) for run, _ in timed])
        axes.barh(np.arange(len(timed)), width, 0.5, left=left, color=part_color, label=part)
        left += width
    for place, (run, color) in enumerate(timed):
        total = f"{left[place]:.3g} ms"
        said = total if len(runs) == 1 else f"{_short(run.label)}: {total}"
        axes.text(0, place - 0.3, said, color=color, va="bottom")
    axes.set_yticks([])
    axes.set_ylim(max(len(timed), 2), -1)  # room for the legend at the foot
    if timed:
        axes.legend(frameon=False, ncols=3, loc="lower left")
    _finish(axes, "ms a step, mean of the run", empty=not timed, label="")


def _mean_milliseconds(run: Curves, part: str) -> float:
    name = f"time/{part}"
    return 1e3 * float(run.train[name][:, 1].mean()) if name in run.train else 0.0


def _gradients(axes: Axes, runs: Sequence[Curves], colors: Sequence[str]) -> None:
    """The norm of all gradients; of one run alone also that of each group of modules."""
    if len(runs) == 1:
        groups = sorted(name for name in runs[0].train if name.startswith(f"{_NORM}/"))
        for place, name in enumerate(groups):
            steps, values = runs[0].train[name].T
            color = _COLORS[(place + 1) % len(_COLORS)]
            axes.plot(steps, values, color=color, lw=1, label=name.removeprefix(f"{_NORM}/"))
    for run, color in zip(runs, colors, strict=True):
        if _NORM in run.train:
            steps, values = run.train[_NORM].T
            axes.plot(steps, values, color=color, lw=1.4, label="all" if len(runs) == 1 else None)
    if len(runs) == 1:
        axes.legend(frameon=False, fontsize="small")
    _finish(axes, "gradient norm, before clipping", log=True,
            empty=not any(_NORM in run.train for run in runs))  # fmt: skip


def _finish(
    axes: Axes, title: str, *, log: bool = False, empty: bool = False, label: str = "step"
) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    if empty:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    axes.grid(alpha=0.25)
    if log:
        axes.set_yscale("log", subs=(2, 3, 5))
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(lambda value, place: f"{value:g}")


def _short(label: str) -> str:
    return label if len(label) <= 24 else f"{label[:11]}…{label[-12:]}"
