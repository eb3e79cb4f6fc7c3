"""``reflexarc doctor``: what is installed, what works, and how to mend what does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from reflexarc.cli.diagnosis.accelerator import check_accelerator
from reflexarc.cli.diagnosis.artefacts import check_checkpoint, check_recipe
from reflexarc.cli.diagnosis.finding import PURPOSES, Finding, Purpose
from reflexarc.cli.diagnosis.machine import (
    check_disk,
    check_memory,
    check_port,
    check_rendering,
)
from reflexarc.cli.diagnosis.packages import all_purposes, check_extras, check_python
from reflexarc.contract.errors import ConfigError

_COLORS = {"ok": "green", "note": "yellow", "broken": "red"}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    for_: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="serve|train|sim",
            help="What must work for exit status 0; by default all that is installed.",
        ),
    ] = "",
    checkpoint: Annotated[
        Path | None,
        typer.Option("--ckpt", "--checkpoint", help="Also load this checkpoint."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Also look for what this recipe names.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="The port that serving would use.")
    ] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Check this machine: packages, torch and CUDA, rendering, memory, disk, port.

    Exit status 1 when something is broken that is needed.
    """
    if for_ and for_ not in PURPOSES:
        raise ConfigError(f"--for {for_!r}: give one of {', '.join(PURPOSES)}", field="for")
    purposes = all_purposes(for_ or None)
    findings = list(_examine(purposes, checkpoint, recipe, port))
    stopping = [finding for finding in findings if finding.stops(purposes)]
    if as_json:
        values = {
            "healthy": not stopping,
            "purposes": purposes,
            "findings": [asdict(finding) for finding in findings],
        }
        typer.echo(json.dumps(values, indent=2))
    else:
        _print(findings, purposes, stopping)
    if stopping:
        raise typer.Exit(1)


def _examine(
    purposes: tuple[Purpose, ...], checkpoint: Path | None, recipe: str | None, port: int
) -> Iterator[Finding]:
    yield check_python()
    yield from check_extras(purposes)
    yield from check_accelerator()
    yield check_rendering()
    yield check_memory()
    yield check_disk(Path.cwd())
    yield check_port(port)
    if checkpoint is not None:
        yield check_checkpoint(checkpoint)
    if recipe is not None:
        yield from check_recipe(recipe)


def _print(findings: list[Finding], purposes: tuple[Purpose, ...], stopping: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("what", no_wrap=True)
    table.add_column("")
    for column in ("found", "mend"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        color = _COLORS[finding.status]
        table.add_row(
            escape(finding.name),
            f"[{color}]{finding.status}[/]",
            escape(finding.said),
            escape(finding.mend),
        )
    console = Console()
    console.print(table)
    purpose = ", ".join(purposes) or "the client"
    if stopping:
        names = ", ".join(finding.name for finding in stopping)
        console.print(f"[red]Broken for {purpose}:[/] {escape(names)}. See docs/troubleshooting.md")
    else:
        console.print(f"[green]Nothing needed for {purpose} is broken.[/]")
