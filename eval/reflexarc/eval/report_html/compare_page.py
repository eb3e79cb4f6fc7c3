"""A comparison as ``compare.json``, ``compare.md`` and ``compare.html``."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reflexarc.eval.arms import ARMS
from reflexarc.eval.compare import ComparedGroup, Comparison, RunSide
from reflexarc.eval.report_html.figures import Picture, Rate, Series, interval_plot
from reflexarc.eval.report_html.rendering import (
    Card,
    Cell,
    Row,
    Table,
    counted,
    difference_note,
    limits,
    p_value,
    percent,
    point_limits,
    points,
    rate_note,
    render,
    write_text,
)
from reflexarc.eval.report_table import format_indices
from reflexarc.eval.summary import RateSummary

METHOD = (
    "Episodes are paired by task and initial state. Rates carry 95 % Wilson intervals; the "
    "difference is A minus B in percentage points, with the 95 % interval of Newcombe's method 10 "
    "for paired proportions and the exact two-sided McNemar p."
)


@dataclass(frozen=True)
class ComparePage:
    """What the template shows; all of it plain text."""

    title: str
    subtitle: str
    warnings: Sequence[str]
    cards: Sequence[Card]
    table: Table
    method: str
    plots: Sequence[tuple[Picture, str]]
    disagreements: Table
    sides: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    command: str


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the three files, each whole or not at all."""
    texts = {
        "compare.json": comparison.model_dump_json(indent=2) + "\n",
        "compare.md": markdown(comparison),
        "compare.html": render("compare.html.j2", compare_page(comparison)),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def compare_page(comparison: Comparison) -> ComparePage:
    return ComparePage(
        title=f"{side_name(comparison.a)} and {side_name(comparison.b)}",
        subtitle=_subtitle(comparison),
        warnings=comparison.warnings,
        cards=_cards(comparison),
        table=task_table(comparison),
        method=METHOD,
        plots=_plots(comparison),
        disagreements=disagreement_table(comparison),
        sides=[(side_name(side), _facts(side)) for side in (comparison.a, comparison.b)],
        command=f"reflexarc eval compare {shlex.quote(comparison.a.folder)} "
        f"{shlex.quote(comparison.b.folder)} --arm {comparison.arm}",
    )


def side_name(side: RunSide) -> str:
    return f"{side.name} ({Path(side.folder).name or side.folder})"


def _subtitle(comparison: Comparison) -> str:
    return (
        f"{comparison.a.suite}, arm {ARMS[comparison.arm].title}, "
        f"{counted(comparison.total.pairs, 'common episode')} of "
        f"{counted(len(comparison.tasks), 'task')}, states {format_indices(comparison.states)}; "
        f"{'one checkpoint' if comparison.same_checkpoint else 'two checkpoints'}"
    )


def _cards(comparison: Comparison) -> list[Card]:
    total = comparison.total
    rates = [
        Card(
            side_name(side),
            percent(one.rate),
            rate_note(one.successes, one.trials, one.low, one.high),
        )
        for side, one in ((comparison.a, total.a), (comparison.b, total.b))
    ]
    lead = Card(
        "A minus B",
        points(total.difference),
        difference_note(total.low, total.high, total.mcnemar_p),
        unit="points",
    )
    split = Card(
        "solved by one only",
        f"{total.a_only} : {total.b_only}",
        f"A only, B only; {total.both} by both, {total.neither} by none",
    )
    return [*rates, lead, split]


def task_table(comparison: Comparison) -> Table:
    """One row a task, and the total."""
    rows = [
        Row(
            _group_name(group),
            [
                _rate_cell(group.a),
                _rate_cell(group.b),
                Cell(points(group.difference), [point_limits(group.low, group.high)]),
                Cell(p_value(group.mcnemar_p)),
                Cell(f"{group.a_only} : {group.b_only}"),
            ],
            group.task is None,
        )
        for group in _groups(comparison)
    ]
    headers = ["task", "A", "B", "A minus B, points", "p", "only A : only B"]
    return Table("Success on the same states", headers, rows)


def disagreement_table(comparison: Comparison) -> Table:
    """One row for each episode that only one run solved."""
    rows = [
        Row(
            f"task {one.task}, state {one.state}"
            + ("" if one.other_task is None else f" (task {one.other_task})"),
            [
                Cell(f"{'solved' if one.solved_by == 'A' else 'failed'} at {one.a_steps}"),
                Cell(f"{'solved' if one.solved_by == 'B' else 'failed'} at {one.b_steps}"),
            ],
        )
        for one in comparison.disagreements
    ]
    return Table("Episodes that only one run solved, with their steps", ["episode", "A", "B"], rows)


def _groups(comparison: Comparison) -> list[ComparedGroup]:
    return [*comparison.tasks, comparison.total]


def _group_name(group: ComparedGroup) -> str:
    return group.instruction if group.task is None else f"{group.task}: {group.instruction}"


def _rate_cell(one: RateSummary) -> Cell:
    return Cell(f"{one.successes}/{one.trials}", [limits(one.low, one.high)])


def _plots(comparison: Comparison) -> list[tuple[Picture, str]]:
    groups = _groups(comparison)
    labels = [_group_name(group) for group in groups]
    rates = interval_plot(
        labels,
        [
            Series(side_name(comparison.a), [_plain(group.a) for group in groups]),
            Series(side_name(comparison.b), [_plain(group.b) for group in groups]),
        ],
        alt="Success of A and B per task with 95 % intervals: the numbers of the table above.",
        x_label="success in %",
    )
    differences = interval_plot(
        labels,
        [Series("A minus B", [Rate(g.difference, g.low, g.high) for g in groups])],
        alt="A minus B per task with 95 % intervals: the numbers of the table above.",
        x_label="A minus B in percentage points",
        signed=True,
    )
    return [
        (rates, "Success per task with 95 % Wilson intervals."),
        (differences, "A minus B on the same states with 95 % intervals; right of 0, A is better."),
    ]


def _plain(one: RateSummary) -> Rate:
    return Rate(one.rate, one.low, one.high)


def _facts(side: RunSide) -> list[tuple[str, str]]:
    return [
        ("folder", side.folder),
        ("checkpoint", side.checkpoint_fingerprint or "without fingerprint"),
        ("contract, sha256", side.contract_sha256),
        ("seed", str(side.seed)),
        ("steps", f"at most {side.max_steps}, {side.execution}, "
         f"wait {side.wait_steps} before the first"),
    ]  # fmt: skip


def markdown(comparison: Comparison) -> str:
    """The tables for a README."""
    lines = [f"### A: {comparison.a.folder}, B: {comparison.b.folder}", "", _subtitle(comparison)]
    if comparison.warnings:
        lines += ["", "Conditions differ:", ""]
        lines += [f"- {line}" for line in comparison.warnings]
    for table in (task_table(comparison), disagreement_table(comparison)):
        if table.rows:
            lines += ["", *_markdown_table(table)]
    return "\n".join([*lines, "", METHOD, ""])


def _markdown_table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(html.escape(c).replace("|", "\\|") for c in cells) + " |"

    return [
        line(table.headers),
        "|" + "|".join([" :-- ", *[" --: "] * (len(table.headers) - 1)]) + "|",
        *(line([row.name, *(_one_line(cell) for cell in row.cells)]) for row in table.rows),
    ]


def _one_line(cell: Cell) -> str:
    return " ".join([cell.text, *(f"[{note}]" for note in cell.notes)])
