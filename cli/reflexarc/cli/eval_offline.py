"""``reflexarc eval offline``: recorded observations through a server, without a simulator."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reflexarc.cli.evaluate import EXIT_SERVER_UNAVAILABLE, LOG_COLUMNS
from reflexarc.cli.extras import require
from reflexarc.cli.groups import eval_app
from reflexarc.contract.errors import NotReadyError, ServerUnavailableError

if TYPE_CHECKING:
    from reflexarc.eval.offline_settings import OfflineSettings
    from reflexarc.eval.offline_summary import OfflineSummary


class LabelKind(str, Enum):
    """Which recorded actions are compared with."""

    executed = "executed"
    expert = "expert"


@eval_app.command("offline")
def offline(
    data: Annotated[
        Path, typer.Option(help="HDF5 file of LIBERO demonstrations, or a folder of them.")
    ],
    server: Annotated[
        str, typer.Option(help="Address that serve-policy printed.")
    ] = "ws://127.0.0.1:8000",
    tasks: Annotated[
        str,
        typer.Option(help="Names of tasks, or parts that fit one each: soup,juice. Default: all."),
    ] = "",
    episodes: Annotated[
        str | None,
        typer.Option(help="Of each task's demonstrations, such as 0-4 or 45-49. Default: all."),
    ] = None,
    every: Annotated[int, typer.Option(help="Ask at every Nth recorded frame.", min=1)] = 1,
    labels: Annotated[
        LabelKind,
        typer.Option(
            help="Compare with the actions that were executed, or with those that the "
            "demonstrator meant, where noise was injected."
        ),
    ] = LabelKind.executed,
    resize: Annotated[
        bool,
        typer.Option(
            "--resize", help="Send images recorded at another size than the policy trained on."
        ),
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for results and tables; the same one resumes.")
    ] = Path("outputs/offline"),
    seed: Annotated[
        int, typer.Option(help="Seed of the sampling noise.", min=0, max=2**32 - 1)
    ] = 0,
    retry_for: Annotated[
        float, typer.Option(help="Seconds to wait for a server that does not answer.", min=0)
    ] = 60.0,
) -> None:
    """How far predicted chunks lie from recorded ones, by dimension, position and task.

    Exits with 3 when the server does not answer; the same command then resumes.
    """
    require("reflexarc eval offline", "sim", "h5py", "scipy", "tqdm", "matplotlib")
    from reflexarc.eval.offline_settings import OfflineSettings
    from reflexarc.eval.run_settings import parse_indices

    settings = OfflineSettings(
        server=server,
        data=data,
        output=output,
        tasks=tuple(part.strip() for part in tasks.split(",") if part.strip()),
        episodes=None if episodes is None else parse_indices(episodes, "--episodes"),
        every=every,
        labels=labels.value,
        resize=resize,
        seed=seed,
        retry_for=retry_for,
    )
    _print(_run(settings), output)


def _run(settings: OfflineSettings) -> OfflineSummary:
    from reflexarc.eval.offline import evaluate_offline

    try:
        return evaluate_offline(settings, notify=typer.echo)
    except (ServerUnavailableError, NotReadyError) as error:
        typer.secho(f"error [{error.code}]: {error.message}", fg=typer.colors.RED, err=True)
        typer.echo("Finished episodes are kept; the same command resumes.", err=True)
        raise typer.Exit(EXIT_SERVER_UNAVAILABLE) from error


def _print(summary: OfflineSummary, output: Path) -> None:
    from rich.console import Console

    from reflexarc.eval.offline_plot import write_plot
    from reflexarc.eval.offline_report import rich_tables

    console = Console()
    if not console.is_terminal:
        console.width = LOG_COLUMNS  # a log file has no edge
    console.print(rich_tables(summary))
    write_plot(summary, output / "offline.png")
    typer.echo(f"Results: {output / 'offline.md'}, {output / 'summary.json'}")
    typer.echo(f"Plot:    {output / 'offline.png'}")
