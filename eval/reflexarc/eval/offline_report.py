"""The tables of an offline comparison, for the terminal and as markdown."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from reflexarc.eval.offline_errors import GripperCounts
from reflexarc.eval.offline_summary import Estimate, OfflineGroup, OfflineSummary


@dataclass(frozen=True)
class PlainTable:
    """Headers and rows of text; the first column is text, the others are numbers."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def tables(summary: OfflineSummary) -> list[PlainTable]:
    """By task, by action dimension, by position in the chunk."""
    return [_task_table(summary), _dimension_table(summary), _position_table(summary)]


def rich_tables(summary: OfflineSummary) -> Group:
    """The tables and what they mean."""
    shown: list[Table | Text] = [_rich(table) for table in tables(summary)]
    return Group(*shown, *(Text(line) for line in notes(summary)))


def markdown(summary: OfflineSummary) -> str:
    """The same for a README."""
    parts = ["# Offline comparison" + ("" if summary.complete else " (incomplete)"), ""]
    for table in tables(summary):
        parts += [f"## {table.title}", "", *_markdown_rows(table), ""]
    return "\n".join([*parts, *(f"- {line}" for line in notes(summary))]) + "\n"


def notes(summary: OfflineSummary) -> list[str]:
    """What was compared, how it was normalised, and how far the numbers carry."""
    identity, total = summary.identity, summary.total
    labels = {
        "executed": "the actions that were executed",
        "expert": "the actions that the demonstrator meant, without injected noise",
    }
    divisor = {
        "checkpoint": "by the standard deviation of the checkpoint's training data",
        "data": "by the standard deviation of the compared data itself, because the server states "
        "none",
    }
    lines = [
        f"{total.questions} questions in {total.episodes} episodes, every "
        f"{_ordinal(identity.every)} recorded frame; {total.actions} predicted actions compared "
        f"with {labels[identity.labels]}; past an episode's end nothing is compared.",
        f"Normalised: divided {divisor[summary.scale_source]}; always predicting the mean gives "
        "an MSE near 1. Means over dimensions leave the gripper out.",
        *([counted] if (counted := _gripper_counts(summary)) else []),
        f"Intervals: {summary.interval}; with few episodes they are too narrow.",
        f"Checkpoint {identity.checkpoint_fingerprint[:12] or 'without fingerprint'}, seed "
        f"{identity.seed}, median latency {summary.latency_median_ms:.0f} ms. A small error is no "
        "success: that only an episode shows.",
    ]
    if identity.resize:
        lines.append("Images of another size than the policy's training images were resized.")
    return lines


def _task_table(summary: OfflineSummary) -> PlainTable:
    headers = ["task", "episodes", "questions", "MAE norm.", "MSE norm.", "gripper right"]
    groups = [*summary.tasks, summary.total]
    return PlainTable("By task", headers, [_task_row(group) for group in groups])


def _task_row(group: OfflineGroup) -> list[str]:
    return [
        group.instruction,
        str(group.episodes),
        str(group.questions),
        _interval(group.mae_normalized),
        _interval(group.mse_normalized),
        _interval(group.gripper_rate, percent=True) if group.gripper_rate else "-",
    ]


def _dimension_table(summary: OfflineSummary) -> PlainTable:
    headers = ["action", "MAE", "MSE", "MAE physical", "std", "MAE norm.", "MSE norm."]
    rows = []
    for one in summary.total.dimensions:
        physical = "-"
        if one.mae_physical is not None:
            physical = f"{one.mae_physical:.2f} {one.physical_unit}"
        rows.append(
            [
                one.name,
                f"{one.mae:.4f}",
                f"{one.mse:.5f}",
                physical,
                _number(one.scale),
                _number(one.mae_normalized),
                _number(one.mse_normalized),
            ]
        )
    return PlainTable("By action dimension (MAE, MSE and std in action units)", headers, rows)


def _position_table(summary: OfflineSummary) -> PlainTable:
    names = [one.name for one in summary.total.dimensions]
    headers = ["position", "MAE norm.", "MSE norm.", "gripper right", *names]
    rows = [
        [
            str(one.first) if one.first == one.last else f"{one.first}-{one.last}",
            f"{one.mae_normalized:.3f}",
            f"{one.mse_normalized:.3f}",
            _share(one.gripper),
            *(f"{value:.3f}" for value in one.dimension_mae),
        ]
        for one in summary.buckets
    ]
    rows.append(["all", *_whole(summary.total)])
    return PlainTable("By position in the chunk (dimensions: MAE in action units)", headers, rows)


def _whole(total: OfflineGroup) -> list[str]:
    return [
        f"{total.mae_normalized.value:.3f}",
        f"{total.mse_normalized.value:.3f}",
        _share(total.gripper),
        *(f"{one.mae:.3f}" for one in total.dimensions),
    ]


def _gripper_counts(summary: OfflineSummary) -> str | None:
    """How many gripper commands were predicted as recorded, by what was recorded."""
    found = summary.total.gripper
    if found is None:
        return None
    return (
        f"Gripper commands predicted as recorded: open {found.open_correct}/{found.open}, "
        f"closed {found.closed_correct}/{found.closed}."
    )


def _share(counts: GripperCounts | None) -> str:
    if counts is None or counts.total == 0:
        return "-"
    return f"{counts.correct}/{counts.total}"


def _interval(estimate: Estimate, *, percent: bool = False) -> str:
    def form(value: float) -> str:
        return f"{100 * value:.1f}" if percent else f"{value:.3f}"

    unit = " %" if percent else ""
    if estimate.low is None or estimate.high is None:
        return form(estimate.value) + unit
    return f"{form(estimate.value)}{unit} [{form(estimate.low)}, {form(estimate.high)}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ordinal(every: int) -> str:
    return {1: "single", 2: "second", 3: "third"}.get(every, f"{every}th")


def _rich(plain: PlainTable) -> Table:
    table = Table(
        title=plain.title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column(plain.headers[0], overflow="fold")
    for header in plain.headers[1:]:
        table.add_column(header.replace(" ", "\n").replace("_", "_\n"), justify="right")
    for row in plain.rows:
        table.add_row(Text(row[0]), *(Text(cell.replace(" [", "\n[")) for cell in row[1:]))
    return table


def _markdown_rows(table: PlainTable) -> list[str]:
    return [
        "| " + " | ".join(table.headers) + " |",
        "|" + "|".join(" :-- " if i == 0 else " --: " for i in range(len(table.headers))) + "|",
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]
