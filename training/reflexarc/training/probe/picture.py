"""z in two dimensions, coloured by task and by progress. Pillow draws it: no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from reflexarc.training.probe.ridge import Floats, Integers

_SIDE, _MARGIN, _LINE = 560, 36, 18
_MOST_POINTS = 6000
_RADIUS = 2.2
_SMOOTH = 2  # drawn this much larger, then reduced
_INK, _GREY, _PAPER = "#222222", "#bbbbbb", "#ffffff"
_TASK_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee",
    "#aa3377", "#555555", "#ee7733", "#009988", "#997700",
)  # fmt: skip
# Viridis at five places.
_PROGRESS_COLOURS = np.array(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64
)
_SHOWN_NAME = 62


def principal_plane(z: Floats) -> tuple[Floats, Floats]:
    """Coordinates ``(n, 2)`` along the two directions of most variance, and their shares ``(2,)``.

    A direction's sign is chosen so that its largest coefficient is positive: the picture of the
    same z is the same everywhere.
    """
    centred = np.asarray(z, dtype=np.float64) - z.mean(0)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(z))
    axes = directions[:, :-3:-1]
    if axes.shape[1] < 2:
        axes = np.pad(axes, ((0, 0), (0, 1)))
    largest = np.abs(axes).argmax(0)
    axes = axes * np.where(axes[largest, [0, 1]] < 0, -1.0, 1.0)
    top = np.pad(variances[:-3:-1], (0, max(0, 2 - len(variances))))
    total = variances.sum()
    return centred @ axes, top / total if total > 0 else np.zeros(2)


def progress_colours(progress: Floats) -> list[str]:
    """Of values in 0..1."""
    place = np.clip(progress, 0, 1) * (len(_PROGRESS_COLOURS) - 1)
    knots = np.arange(len(_PROGRESS_COLOURS))
    channels = [np.interp(place, knots, _PROGRESS_COLOURS[:, c]).round() for c in range(3)]
    return [f"#{int(r):02x}{int(g):02x}{int(b):02x}" for r, g, b in zip(*channels, strict=True)]


def draw(
    path: Path,
    z: Floats,
    tasks: Integers,
    progress: Floats,
    task_names: Sequence[str],
    title: str,
    *,
    seed: int = 0,
) -> None:
    """Write a PNG of two panels. ``z (n, D)``, ``tasks (n,)`` into ``task_names``."""
    points, shares = principal_plane(z)
    kept = np.random.default_rng(seed).permutation(len(points))[:_MOST_POINTS]
    height = 2 * _MARGIN + _SIDE + _LINE * (max(len(task_names), 2) + 2)
    canvas = _Canvas(3 * _MARGIN + 2 * _SIDE, height)
    canvas.text(_MARGIN, 10, title)
    by_task = [_TASK_COLOURS[task % len(_TASK_COLOURS)] for task in tasks[kept]]
    for left, colours in (
        (_MARGIN, by_task),
        (2 * _MARGIN + _SIDE, progress_colours(progress[kept])),
    ):
        _panel(canvas, left, points[kept], colours, shares)
    below = _MARGIN + _SIDE + 8 + _LINE
    for i, name in enumerate(task_names):
        top = below + i * _LINE
        canvas.disc(_MARGIN + 6, top + 8, 5, _TASK_COLOURS[i % len(_TASK_COLOURS)])
        shown = name if len(name) <= _SHOWN_NAME else name[: _SHOWN_NAME - 3] + "..."
        canvas.text(_MARGIN + 18, top, shown.replace("_", " "))
    _progress_bar(canvas, 2 * _MARGIN + _SIDE, below)
    canvas.save(path)


class _Canvas:
    """A white image, in units of final pixels."""

    def __init__(self, width: int, height: int):
        self.size = (width, height)
        self._image = Image.new("RGB", (width * _SMOOTH, height * _SMOOTH), _PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._font = ImageFont.load_default(13 * _SMOOTH)

    def text(self, x: float, y: float, text: str) -> None:
        self._draw.text((x * _SMOOTH, y * _SMOOTH), text, fill=_INK, font=self._font)

    def disc(self, x: float, y: float, radius: float, colour: str) -> None:
        box = [(c + sign * radius) * _SMOOTH for sign in (-1, 1) for c in (x, y)]
        self._draw.ellipse(box, fill=colour)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str | None = None,
        outline: str | None = None,
    ) -> None:
        corners = [v * _SMOOTH for v in (x, y, x + width, y + height)]
        self._draw.rectangle(corners, fill=fill, outline=outline)

    def save(self, path: Path) -> None:
        small = self._image.resize(self.size, Image.Resampling.LANCZOS)
        temporary = path.with_name(path.name + ".tmp")
        small.save(temporary, format="PNG")
        temporary.replace(path)


def _panel(
    canvas: _Canvas, left: float, points: Floats, colours: Sequence[str], shares: Floats
) -> None:
    canvas.box(left, _MARGIN, _SIDE, _SIDE, outline=_GREY)
    scale, middle = _fit(points)
    for (x, y), colour in zip((points - middle) * scale, colours, strict=True):
        canvas.disc(left + _SIDE / 2 + x, _MARGIN + _SIDE / 2 - y, _RADIUS, colour)
    caption = (
        f"first two principal components of z: {shares[0]:.0%} and {shares[1]:.0%} of variance"
    )
    canvas.text(left, _MARGIN + _SIDE + 4, caption)


def _fit(points: Floats) -> tuple[float, npt.NDArray[np.float64]]:
    """One scale for both axes, so that distances are true, and the middle of the points."""
    low, high = points.min(0), points.max(0)
    extent = float((high - low).max())
    return (0.94 * _SIDE / extent if extent > 0 else 1.0), (low + high) / 2


def _progress_bar(canvas: _Canvas, left: float, top: float) -> None:
    width = 200
    for i, colour in enumerate(progress_colours(np.linspace(0, 1, width))):
        canvas.box(left + i, top + 4, 1, 10, fill=colour)
    canvas.text(left + width + 8, top, "start to end of the episode")
