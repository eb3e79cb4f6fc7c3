"""``reflexarc query --plot``: predicted chunks against recorded actions along one episode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from reflexarc.cli.extras import require
from reflexarc.contract.errors import ConfigError

if TYPE_CHECKING:
    from reflexarc.client import HttpPolicyClient, PolicyClient


def plot_episode(
    client: PolicyClient | HttpPolicyClient,
    plot: Path,
    data: Path | None,
    *,
    task: str,
    episode: int,
    every: int,
    seed: int,
) -> None:
    """Ask along one demonstration and write the picture.

    Raises ConfigError without data, and what ``eval offline`` raises for data that does not fit.
    """
    require("reflexarc query --plot", "sim", "h5py", "scipy", "matplotlib")
    from reflexarc.eval.chunk_plot import ask_along, write_chunk_plot
    from reflexarc.eval.offline_data import select_episodes
    from reflexarc.eval.offline_settings import OfflineSettings

    if data is None:
        raise ConfigError(
            "--plot draws along a demonstration: name its file or folder with --data", field="data"
        )
    settings = OfflineSettings(
        server="",
        data=data,
        output=plot.parent,
        tasks=(task,) if task else (),
        episodes=(episode,),
        every=every,
        seed=seed,
    )
    recorded = select_episodes(settings, client.contract)[0]
    predicted = ask_along(client, recorded, seed)
    plot.parent.mkdir(parents=True, exist_ok=True)
    write_chunk_plot(predicted, plot)
    errors = zip(predicted.names, predicted.mean_absolute_errors(), strict=True)
    typer.echo(f"{recorded.name}: {len(predicted.steps)} chunks; mean absolute errors:")
    typer.echo(", ".join(f"{name} {error:.4f}" for name, error in errors))
    typer.echo(f"Plot: {plot}")
