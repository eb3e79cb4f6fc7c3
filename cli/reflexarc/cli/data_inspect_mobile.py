"""``reflexarc data inspect`` of a mobile robot's episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from reflexarc.data.mobile.inspection import MobileReport


def read_report(paths: Sequence[Path], *, images: bool) -> MobileReport:
    """Inspect with a progress bar."""
    from tqdm import tqdm

    from reflexarc.data.mobile.inspection import inspect_mobile

    with tqdm(unit="episode", disable=None) as progress:

        def advance(name: str) -> None:
            progress.set_postfix_str(name, refresh=False)
            progress.update()

        return inspect_mobile(paths, read_images=images, on_episode=advance)


def print_report(report: MobileReport, console: Console) -> None:
    """A table, then notes and what cannot be used."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(report):
        table.add_row(name, escape(value))
    console.print(f"[bold]{escape(', '.join(report.paths))}[/]", soft_wrap=True)
    console.print(table)
    for remark in report.remarks:
        console.print(f"  [yellow]note[/] {escape(remark)}", soft_wrap=True)
    for problem in report.problems:
        console.print(f"  [red]unusable[/] {escape(problem.message)}", soft_wrap=True)


def _rows(report: MobileReport) -> list[tuple[str, str]]:
    if not report.episodes:
        return [("episodes", "none that can be used")]
    told = "\n".join(f"{count:5d}  {text}" for text, count in report.instructions.items())
    sizes = ", ".join(f"{height}x{width}" for height, width, _ in report.image_shapes)
    rates = ", ".join(f"{rate:g} Hz" for rate in report.control_hz) or "not said"
    ranges = "\n".join(f"{r.name:<10} {r.minimum:8.3f} to {r.maximum:7.3f} m/s"
                       for r in report.actions)  # fmt: skip
    return [
        ("episodes", f"{report.episodes}, {report.shortest} to {report.longest} steps"),
        ("steps", f"{report.steps}, an image each, {sizes} px, {rates}"),
        ("instructions", told),
        ("velocities", ranges),
        ("standing", f"{report.still_share:.1%} of steps"),
        ("labels", f"{report.with_expert} episodes hold expert_actions beside what was executed"),
    ]
