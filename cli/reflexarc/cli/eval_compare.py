"""``reflexarc eval compare``: two evaluations of the same initial states, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import eval_app
from reflexarc.contract.errors import ConfigError

if TYPE_CHECKING:
    from reflexarc.eval.arms import Arm
    from reflexarc.eval.compare import Comparison


@eval_app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(help="Results folder of run A.")],
    b: Annotated[Path, typer.Argument(help="Results folder of run B.")],
    output: Annotated[
        Path, typer.Option(help="Folder for compare.json, compare.md and compare.html.")
    ] = Path("outputs/compare"),
    arm: Annotated[str, typer.Option(help="Which arm of the two runs to compare.")] = "policy",
) -> None:
    """Pair two runs by task and initial state: rates, difference, McNemar, where they differ."""
    require("reflexarc eval compare", "sim", "jinja2", "matplotlib", "av", "scipy")
    from reflexarc.eval.compare import compare as compare_runs
    from reflexarc.eval.report_html.compare_page import write_comparison

    comparison = compare_runs(a, b, arm_named(arm))
    written = write_comparison(comparison, output)
    _print(comparison)
    typer.echo("Written: " + ", ".join(map(str, written)))


def arm_named(name: str) -> Arm:
    from reflexarc.eval.arms import ARMS

    if name not in ARMS:
        raise ConfigError(f"--arm {name!r} is unknown; choose from {', '.join(ARMS)}", field="arm")
    return cast("Arm", name)


def _print(comparison: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from reflexarc.eval.report_html.compare_page import side_name, task_table

    for warning in comparison.warnings:
        typer.secho(f"note: {warning}", fg=typer.colors.YELLOW, err=True)
    data = task_table(comparison)
    title = f"{side_name(comparison.a)} and {side_name(comparison.b)}"
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(data.headers):
        table.add_column(header, justify="right" if index else "left")
    for row in data.rows:
        cells = ["\n".join([cell.text, *cell.notes]) for cell in row.cells]
        table.add_row(Text(row.name), *map(Text, cells))
    Console().print(table)
