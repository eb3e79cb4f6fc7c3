"""``reflexarc data collect-mobile``: episodes of the mobile world by the scripted driver."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import data_app
from reflexarc.contract.errors import ConfigError


@data_app.command("collect-mobile")
def collect_mobile(
    output: Annotated[Path, typer.Option(help="Folder for episode_*.h5 files.")] = Path(
        "datasets/mobile"
    ),
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of each target.")] = 120,
    tasks: Annotated[str, typer.Option(help="Targets, such as 0,2. Default: all.")] = "",
    image_size: Annotated[int, typer.Option(help="Height and width of images, pixels.")] = 224,
    action_noise: Annotated[
        float, typer.Option(help="Deviation of the noise on executed velocities, m/s.")
    ] = 0.15,
    seed: Annotated[int, typer.Option(help="Of scenes and noise.")] = 0,
) -> None:
    """Collect episodes in random scenes of the mobile world, one file each.

    Run the same command again after an interruption: finished episodes are kept.
    """
    require("reflexarc data collect-mobile", "sim", "mujoco", "h5py", "scipy", "tqdm")
    from pydantic import ValidationError
    from tqdm import tqdm

    from reflexarc.eval.mobile.collect import CollectionSettings, collect
    from reflexarc.eval.mobile.tasks import TARGETS
    from reflexarc.eval.run_settings import parse_indices

    try:
        settings = CollectionSettings(image_size=image_size, action_noise=action_noise, seed=seed)
    except ValidationError as error:
        problem = error.errors()[0]
        name = "--" + str(problem["loc"][0]).replace("_", "-")
        raise ConfigError(f"{name} {problem['input']}: {problem['msg']}") from error
    chosen = parse_indices(tasks, "--tasks") if tasks else None
    total = episodes * (len(TARGETS) if chosen is None else len(chosen))
    with tqdm(total=total, unit="episode", disable=None) as progress:

        def advance(name: str) -> None:
            progress.update()

        summary = collect(
            settings,
            output,
            episodes=episodes,
            tasks=chosen,
            on_episode=advance,
        )
    typer.echo(
        f"{summary.episodes} episodes in {output}: {summary.steps} steps, {summary.shortest} to "
        f"{summary.longest} an episode; an obstacle on the straight way in {summary.obstructed}; "
        f"{summary.failed} attempts failed"
    )
    typer.echo(f"Look at them with: reflexarc data inspect {output}")
