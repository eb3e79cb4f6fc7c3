"""Colours and markers of arms, for paper and for dark screens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colours of one plot; each stands out from ``paper`` by a contrast of at least 4.5.

    Attributes:
        name: ``light`` or ``dark``.
        series: one colour an arm, in the arms' order.
    """

    name: str
    paper: str
    ink: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#3d4450",
    grid="#d9dee5",
    series=("#0b5cad", "#a84b00", "#6b4aa0", "#00705f", "#a3155b", "#5a5a00"),
)
DARK = Theme(
    name="dark",
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
    """How one arm is drawn."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


def look(theme: Theme, index: int) -> Look:
    """The look of the arm that stands at ``index``; looks repeat after six arms."""
    here = index % len(MARKERS)
    return Look(theme.series[here], MARKERS[here], LINES[here])


def looks(theme: Theme, names: Sequence[str]) -> dict[str, Look]:
    return {name: look(theme, index) for index, name in enumerate(names)}
