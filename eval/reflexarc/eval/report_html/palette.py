"""Colours and markers of arms, for paper and for dark screens."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colours of plots; ink and series stand out from ``paper`` by a contrast of at least 4.5.

    Attributes:
        series: one colour an arm, in the arms' order.
    """

    paper: str
    ink: str
    grid: str
    series: tuple[str, ...]

    @property
    def colours(self) -> tuple[str, ...]:
        return (self.paper, self.ink, self.grid, *self.series)


LIGHT = Theme(
    paper="#ffffff",
    ink="#3d4450",
    grid="#d9dee5",
    series=("#0b5cad", "#a84b00", "#6b4aa0", "#00705f", "#a3155b", "#5a5a00"),
)
DARK = Theme(
    paper="#171c23",
    ink="#c3ccd8",
    grid="#39424f",
    series=("#6cb6ff", "#ffab5e", "#c9a6ff", "#4fd1c5", "#ff8ac0", "#d6d65c"),
)
MARKERS = ("o", "s", "D", "^", "v", "P")
# Arms are told apart without colour too.
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


@dataclass(frozen=True)
class Look:
    """How one arm is drawn on paper."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


def look(index: int) -> Look:
    """The look of the arm that stands at ``index``; looks repeat after six arms."""
    here = index % len(MARKERS)
    return Look(LIGHT.series[here], MARKERS[here], LINES[here])


def darkened(svg: str) -> str:
    """The same drawing with the colours of paper exchanged for those of dark screens."""
    colours = dict(zip(LIGHT.colours, DARK.colours, strict=True))
    return re.sub("|".join(colours), lambda found: colours[found[0]], svg)
