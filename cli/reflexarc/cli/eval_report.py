"""``reflexarc eval report``: write the page about a finished evaluation anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import eval_app


@eval_app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="The --output folder of reflexarc eval libero.")],
) -> None:
    """Write report.html into a results folder: tables, plots, filmstrips and videos."""
    require("reflexarc eval report", "sim", "jinja2", "matplotlib", "av", "scipy")
    from reflexarc.eval.report_html.run_page import write_report

    path = write_report(folder)
    typer.echo(f"Report: {path} ({path.stat().st_size / 2**20:.1f} MiB)")
