"""``reflexarc runs list | plot | stop``: what trains, how it goes, and how to end it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import runs_app
from reflexarc.contract.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from reflexarc.training.runs.overview import RunOverview

_COLORS = {"running": "green", "complete": "blue", "stopped": "yellow", "died": "red"}
_NEEDED = ("filelock", "yaml")


@runs_app.command("list")
def list_(
    directory: Annotated[
        Path, typer.Argument(help="Folder that holds runs, or one run's own.")
    ] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead.")] = False,
) -> None:
    """List runs: how far they are, their loss and best metric, whether they still train."""
    require("reflexarc runs list", "train", *_NEEDED)
    from rich.console import Console

    from reflexarc.training.runs.overview import find_runs, read_overview

    found = [read_overview(folder) for folder in find_runs(directory)]
    if as_json:
        rows = [{**asdict(one), "path": str(one.path)} for one in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not found:
        typer.echo(f"No runs in {directory}.")
        return
    console = Console()
    console.print(_table(found, directory))
    for one in found:
        if one.reason is not None:
            console.print(f"{_shown_path(one, directory)}: {one.reason}", markup=False)


@runs_app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN...")],
    output: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")],
) -> None:
    """Draw losses, the best metric, learning rate, time split and gradients of runs."""
    require("reflexarc runs plot", "train", *_NEEDED)
    require("reflexarc runs plot", "train", "matplotlib")
    from reflexarc.training.runs.plot import draw, read_curves

    if output.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--output {output}: name a .png, .svg or .pdf file", field="output")
    figure = draw([read_curves(folder) for folder in runs])
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    figure.savefig(temporary, format=output.suffix[1:], dpi=120)
    temporary.replace(output)
    typer.echo(f"Written: {output}")


@runs_app.command()
def stop(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for its step and its checkpoint.")
    ] = 600.0,
) -> None:
    """Let a run finish its step, save and stop; says what became of it."""
    require("reflexarc runs stop", "train", *_NEEDED)
    from reflexarc.training.runs.asking_to_stop import stop_run

    typer.echo(stop_run(run, patience=timeout, log=typer.echo))


def _table(found: list[RunOverview], directory: Path) -> Table:
    from rich.table import Table

    table = Table()
    for column in ("run", "recipe"):
        table.add_column(column, overflow="fold")
    for column in ("step", "epoch", "loss", "best", "samples/s", "state", "age"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found:
        color = _COLORS[one.state]
        table.add_row(
            _shown_path(one, directory),
            one.name,
            f"{_number(one.step, 'd')}/{_number(one.total_steps, 'd')}",
            _number(one.epoch, ".2f"),
            _number(one.loss, ".4f"),
            _best(one),
            _number(one.samples_per_second, ".0f"),
            f"[{color}]{one.state}[/]",
            _age(one.seconds_since),
        )
    return table


def _shown_path(one: RunOverview, directory: Path) -> str:
    shown = one.path.relative_to(directory)
    return one.path.name if shown == Path() else shown.as_posix()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _best(one: RunOverview) -> str:
    if one.best_value is None:
        return "-"
    return f"{one.best_metric} {one.best_value:.4f}\nat {one.best_step}"


def _age(seconds: float) -> str:
    """Since something was last written, in the largest fitting unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
