"""``reflexarc data generate``: small made-up demonstrations for debug recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import data_app


@data_app.command()
def generate(
    output: Annotated[Path, typer.Option(help="Folder for <task>_demo.hdf5 files.")] = Path(
        "datasets/generated"
    ),
    tasks: Annotated[int, typer.Option(min=1, max=4, help="One a colour of the block.")] = 2,
    demos: Annotated[int, typer.Option(min=1, help="Demonstrations of each task.")] = 10,
    steps: Annotated[int, typer.Option(min=8, help="Of each demonstration.")] = 24,
    render_every: Annotated[int, typer.Option(min=1, help="Steps between two images.")] = 2,
    image_size: Annotated[int, typer.Option(help="Height and width of images, pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of positions and noise.")] = 0,
) -> None:
    """Write made-up demonstrations: a hand goes to a block, closes on it and lifts it.

    A second, no simulator. The debug recipes train on what the defaults write.
    """
    require("reflexarc data generate", "train", "h5py")
    from reflexarc.data.generated import GeneratedSettings, write_generated

    settings = GeneratedSettings(
        tasks=tasks,
        episodes=demos,
        steps=steps,
        render_every=render_every,
        image_size=image_size,
        seed=seed,
    )
    for path in write_generated(output, settings):
        typer.echo(f"Written: {path} ({path.stat().st_size / 2**20:.1f} MiB)")
