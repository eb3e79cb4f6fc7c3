"""The tables of ``reflexarc data inspect`` for LeRobot folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from reflexarc.data.inspection import Range
    from reflexarc.data.lerobot.inspection import LeRobotReport

_TASKS_SHOWN, _RANGES_SHOWN = 10, 64


def print_report(report: LeRobotReport, console: Console) -> None:
    """Print one folder's report."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(report):
        table.add_row(name, escape(value))
    console.print(f"[bold]{escape(report.path)}[/]", soft_wrap=True)
    console.print(table)
    for remark in report.remarks:
        console.print(f"  [yellow]note[/] {escape(remark)}", soft_wrap=True)
    for problem in report.problems:
        console.print(f"  [red]unusable[/] {escape(problem.message)}", soft_wrap=True)


def _rows(report: LeRobotReport) -> list[tuple[str, str]]:
    if not report.episodes:
        return [("episodes", "none that can be used")]
    tasks = [f"{count} x {text}" for text, count in report.tasks[:_TASKS_SHOWN]]
    if len(report.tasks) > _TASKS_SHOWN:
        tasks.append(f"and {len(report.tasks) - _TASKS_SHOWN} more")
    cameras = [
        f"{c.name:<16} {c.height}x{c.width} {c.codec or 'in parquet'}  ({c.feature})"
        for c in report.cameras
    ]
    rows = [
        ("format", f"LeRobot {report.version}, {report.robot or 'robot not named'}"),
        ("episodes", f"{report.episodes}, {report.shortest} to {report.longest} rows"),
        ("frames", f"{report.frames} a camera, {report.fps:g} a second"),
        ("tasks", "\n".join(tasks)),
        ("cameras", "\n".join(cameras) or "none"),
        ("absent cameras", "\n".join(report.absent_cameras) or "none"),
        ("features", "\n".join(f"{key:<28} {what}" for key, what in report.features.items())),
        ("state parts", ", ".join(report.state_parts)),
        ("action parts", ", ".join(report.action_parts)),
        ("actions", _lines(report.actions)),
        ("states", _lines(report.states)),
    ]
    return [(name, value) for name, value in rows if value]


def _lines(ranges: list[Range]) -> str:
    shown = [f"{r.name:<24} {r.minimum:11.4f} to {r.maximum:10.4f}" for r in ranges[:_RANGES_SHOWN]]
    if len(ranges) > _RANGES_SHOWN:
        shown.append(f"and {len(ranges) - _RANGES_SHOWN} more dimensions, in --json")
    return "\n".join(shown)
