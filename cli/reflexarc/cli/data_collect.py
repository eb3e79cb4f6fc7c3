"""``reflexarc data collect``: demonstrations of LIBERO tasks by the scripted expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import data_app
from reflexarc.contract.errors import ConfigError

if TYPE_CHECKING:
    from reflexarc.eval.libero.collect import CollectionSummary


@data_app.command()
def collect(
    suite: Annotated[str, typer.Option(help="LIBERO suite, such as libero_object.")],
    output: Annotated[Path, typer.Option(help="Folder for <task>_demo.hdf5 files.")],
    tasks: Annotated[str, typer.Option(help="Task indices, such as 0,9. Default: all.")] = "",
    demos: Annotated[int, typer.Option(min=1, help="Demonstrations of each task.")] = 50,
    image_size: Annotated[int, typer.Option(help="Height and width of images, pixels.")] = 256,
    render_every: Annotated[int, typer.Option(help="Steps between two stored images.")] = 4,
    action_noise: Annotated[
        float, typer.Option(help="Standard deviation of noise on actions; 1 is 5 cm.")
    ] = 0.1,
    workers: Annotated[int, typer.Option(min=1, help="Processes, 2.1 GB each.")] = 1,
    seed: Annotated[int, typer.Option(help="Base seed of object poses and noise.")] = 0,
) -> None:
    """Collect demonstrations with the scripted expert, from seeded resets.

    Run the same command again after an interruption: finished demonstrations are kept.
    """
    require("reflexarc data collect", "sim", "libero", "mujoco", "robosuite", "h5py", "tqdm")
    from pydantic import ValidationError

    from reflexarc.eval.libero.collect import CollectionSettings
    from reflexarc.eval.libero.collect import collect as run_collection

    try:
        settings = CollectionSettings(
            suite=suite,
            image_size=image_size,
            render_every=render_every,
            action_noise=action_noise,
            seed=seed,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        name = "--" + str(problem["loc"][0]).replace("_", "-")
        raise ConfigError(f"{name} {problem['input']}: {problem['msg']}") from error
    summary = run_collection(settings, output, demos=demos, tasks=_indices(tasks), workers=workers)
    _print_summary(summary, output)


def _indices(text: str) -> list[int] | None:
    """``"0,2-4"`` -> ``[0, 2, 3, 4]``; None for an empty text."""
    from reflexarc.eval.run_settings import parse_indices

    return list(parse_indices(text, "--tasks")) if text else None


def _print_summary(summary: CollectionSummary, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary.settings['suite']} in {output}")
    for heading in ("task", "name", "demos", "attempts", "steps", "longest", "frames", "MB"):
        table.add_column(heading, justify="left" if heading == "name" else "right")
    for row in summary.tasks:
        cells = (
            row.index, row.task, row.demos, row.attempts,
            row.mean_steps, row.longest, row.frames, row.megabytes,
        )  # fmt: skip
        table.add_row(*map(str, cells))
    console = Console()
    console.print(table)
    console.print(f"Look at {output / 'contact_sheet.png'} before training.")
