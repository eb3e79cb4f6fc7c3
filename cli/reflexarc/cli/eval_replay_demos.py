"""``reflexarc eval replay-demos``: recorded actions of demonstrations in the simulator."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import eval_app
from reflexarc.cli.served import print_wide

if TYPE_CHECKING:
    from rich.table import Table

    from reflexarc.eval.replay_episode import ReplayIdentity
    from reflexarc.eval.replay_report import ReplayRow


class ActionRotation(str, Enum):
    """How rotation deltas are read."""

    as_recorded = "as_recorded"
    euler = "euler"
    reversed = "reversed"


class StateRotation(str, Enum):
    """How the live hand's orientation is written."""

    axis_angle = "axis_angle"
    euler = "euler"


@eval_app.command("replay-demos")
def replay_demos(
    data: Annotated[
        Path, typer.Option(help="HDF5 file of LIBERO demonstrations, or a folder of them.")
    ],
    suite: Annotated[str, typer.Option(help="The suite of their tasks.")] = "libero_object",
    tasks: Annotated[
        str, typer.Option(help="Parts of tasks' names: soup,juice. Default: all.")
    ] = "",
    episodes: Annotated[
        str | None, typer.Option(help="Of each task's demonstrations, such as 0-4. Default: all.")
    ] = None,
    shift: Annotated[
        int,
        typer.Option(help="Execute at step t the action of t + SHIFT: 1 or -1 is the off-by-one."),
    ] = 0,
    action_rotation: Annotated[
        ActionRotation, typer.Option(help="Read rotation deltas otherwise than they were meant.")
    ] = ActionRotation.as_recorded,
    state_rotation: Annotated[
        StateRotation, typer.Option(help="Write the hand's orientation otherwise than recorded.")
    ] = StateRotation.axis_angle,
    settle_steps: Annotated[
        int, typer.Option(help="Steps to hold still after the last action.", min=0)
    ] = 10,
    workers: Annotated[int, typer.Option(help="Simulator processes.", min=1, max=16)] = 1,
    output: Annotated[
        Path, typer.Option(help="Folder for results and report; started again, it goes on there.")
    ] = Path("outputs/replay"),
) -> None:
    """Whether demonstrations do what they show when their actions are executed again.

    Exits with 1 when one of them does not reach its goal, or the hand strays from the recorded
    one: tasks forgive a step's delay now and then, and the table shows it nevertheless.
    """
    require("reflexarc eval replay-demos", "sim", "libero", "mujoco", "h5py", "scipy", "tqdm")
    from tqdm import tqdm

    from reflexarc.eval.replay_demos import ReplaySettings, replay
    from reflexarc.eval.replay_episode import Mistakes, ReplayIdentity
    from reflexarc.eval.replay_report import summary_rows, write_replay
    from reflexarc.eval.run_settings import parse_indices

    run = ReplayIdentity(
        suite=suite,
        settle_steps=settle_steps,
        mistakes=Mistakes(
            action_shift=shift,
            action_rotation=action_rotation.value,
            state_rotation=state_rotation.value,
        ),
    )
    settings = ReplaySettings(
        data=data,
        run=run,
        tasks=tuple(part.strip() for part in tasks.split(",") if part.strip()),
        episodes=None if episodes is None else parse_indices(episodes, "--episodes"),
        workers=workers,
    )
    with tqdm(unit="episode", smoothing=0, delay=1) as progress:

        def advance(finished: int, total: int) -> None:
            if progress.total is None:  # what an earlier run finished says nothing about the rate
                progress.total, progress.initial, progress.n = total, finished, finished
            progress.update(finished - progress.n)

        results = replay(settings, output, notify=tqdm.write, on_progress=advance)
    write_replay(output, settings, results)
    rows = summary_rows(results)
    print_wide(_table(run, rows))
    typer.echo(f"Report: {output / 'replay.md'}, {output / 'replay.json'}")
    everything = rows[-1]
    good = everything.successes == everything.followed == everything.episodes
    raise typer.Exit(0 if good else 1)


def _table(run: ReplayIdentity, rows: list[ReplayRow]) -> Table:
    from rich.table import Table

    table = Table(title=f"replay: {run.mistakes.in_words}", title_justify="left")
    table.add_column("task", overflow="fold")
    for heading in (
        "success",
        "95 %",
        "followed",
        "median steps",
        "position (mm)",
        "rotation (rad)",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.successes} of {row.episodes}",
            f"{100 * row.low:.0f}-{100 * row.high:.0f}",
            f"{row.followed} of {row.episodes}",
            f"{row.median_steps:g}",
            f"{row.position_error_mm:.2f}",
            f"{row.rotation_error:.3f}",
        )
    return table
