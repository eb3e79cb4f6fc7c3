"""``reflexarc eval offline``: recorded observations through a server, without a simulator."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import eval_app
from reflexarc.cli.served import (
    DEFAULT_RETRY_FOR,
    DEFAULT_SERVER,
    RetryFor,
    Seed,
    Server,
    exit_when_unavailable,
    print_wide,
)

if TYPE_CHECKING:
    from reflexarc.eval.offline_summary import OfflineSummary


class LabelKind(str, Enum):
    """Which recorded actions are compared with."""

    executed = "executed"
    expert = "expert"


@eval_app.command("offline")
def offline(
    data: Annotated[
        Path,
        typer.Option(
            help="HDF5 file of LIBERO demonstrations, a folder of them, or a LeRobot folder."
        ),
    ],
    server: Server = DEFAULT_SERVER,
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
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="The policy's run or its recipe.yaml, where that renamed or sliced parts or "
            "cameras of the LeRobot folder."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for results and tables; the same one resumes.")
    ] = Path("outputs/offline"),
    seed: Seed = 0,
    retry_for: RetryFor = DEFAULT_RETRY_FOR,
) -> None:
    """How far predicted chunks lie from recorded ones, by dimension, position and task.

    Exits with 3 when the server does not answer; the same command then resumes.
    """
    require("reflexarc eval offline", "sim", "h5py", "scipy", "tqdm", "matplotlib")
    from reflexarc.cli.recipe_data_section import read_recipe_data
    from reflexarc.eval.offline import evaluate_offline
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
        recipe_data=None if recipe is None else read_recipe_data(recipe),
        seed=seed,
        retry_for=retry_for,
    )
    with exit_when_unavailable(server, output):
        _print(evaluate_offline(settings, notify=typer.echo), output)


def _print(summary: OfflineSummary, output: Path) -> None:
    from reflexarc.eval.offline_plot import write_plot
    from reflexarc.eval.offline_report import rich_tables

    print_wide(rich_tables(summary))
    write_plot(summary, output / "offline.png")
    typer.echo(f"Results: {output / 'offline.md'}, {output / 'summary.json'}")
    typer.echo(f"Plot:    {output / 'offline.png'}")
