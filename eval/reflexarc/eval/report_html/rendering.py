"""Templates to pages: everything that comes from results is escaped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

MINUS = "\N{MINUS SIGN}"
NBSP = "\N{NO-BREAK SPACE}"
SMALLEST_P = 0.0001
NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """One value of a table, with the lines that stand small under it."""

    text: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    name: str
    cells: Sequence[Cell]
    total: bool = False


@dataclass(frozen=True)
class Table:
    """``headers`` count one more than a row's cells: the first is the rows' name."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Card:
    """One headline number; a unit stands smaller beside it."""

    title: str
    value: str
    note: str
    unit: str = ""


def render(template: str, page: object) -> str:
    """A page as text. ``page`` holds plain text only; nothing in it is taken for markup."""
    environment = Environment(
        loader=PackageLoader("reflexarc.eval.report_html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(page=page)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def percent(rate: float) -> str:
    return f"{100 * rate:.0f}{NBSP}%"


def limits(low: float, high: float) -> str:
    """``72 to 100 %``."""
    return f"{100 * low:.0f} to {100 * high:.0f}{NBSP}%"


def points(difference: float) -> str:
    """Percentage points with their sign, 0 without one."""
    rounded = round(100 * difference)
    return f"{rounded:+d}".replace("-", MINUS) if rounded else "0"


def p_value(p: float) -> str:
    return f"{p:.2g}" if p >= SMALLEST_P else f"<{NBSP}{SMALLEST_P}"


def rate_note(successes: int, trials: int, low: float, high: float) -> str:
    """What stands under a rate that is shown large."""
    return f"{successes} of {trials} episodes; 95{NBSP}%: {limits(low, high)}"


def difference_note(low: float, high: float, p: float) -> str:
    """What stands under a difference that is shown large."""
    sign = f"={NBSP}" if p >= SMALLEST_P else ""
    return f"95{NBSP}%: {point_limits(low, high)}; McNemar p{NBSP}{sign}{p_value(p)}"


def counted(count: int, noun: str) -> str:
    """``1 task``, ``2 tasks``."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def point_limits(low: float, high: float) -> str:
    return f"{points(low)} to {points(high)}"
