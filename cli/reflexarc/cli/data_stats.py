"""``reflexarc data stats``: exact statistics of states and actions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import data_app
from reflexarc.contract.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from reflexarc.contract.statistics import FeatureStatistics
    from reflexarc.data.dataset import EpisodeDataset, Labels

_COLUMNS = ("mean", "std", "min", "q01", "q99", "max")


@data_app.command()
def stats(
    paths: Annotated[
        list[Path], typer.Argument(help="HDF5 files or folders of them, or one LeRobot folder.")
    ],
    state: Annotated[
        str,
        typer.Option(help="LIBERO: a state layout. LeRobot: parts, such as left_arm,left_hand."),
    ] = "",
    action: Annotated[str, typer.Option(help="LeRobot: parts of the action.")] = "",
    labels: Annotated[str, typer.Option(help="executed, or expert where it is recorded.")] = (
        "executed"
    ),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write norm_stats.json's content here.")
    ] = None,
) -> None:
    """Mean, deviation, range and 1st and 99th percentile of every dimension, over every step."""
    require("reflexarc data stats", "train", "h5py", "pyarrow", "av")
    from rich.console import Console

    from reflexarc.data.libero_writer import atomic_path
    from reflexarc.data.statistics import compute_statistics

    dataset, layout = _open(paths, state, action)
    found = compute_statistics(dataset, layout, labels=_labels(labels))
    console = Console()
    console.print(f"{found.state.count} steps of {len(dataset.episodes)} episodes")
    for title, feature in (("state", found.state), ("action", found.action)):
        console.print(_table(title, feature))
    console.print(f"fingerprint {found.dataset_fingerprint}", soft_wrap=True)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(json_file) as temporary:
            temporary.write_text(found.to_json())


def _open(paths: list[Path], state: str, action: str) -> tuple[EpisodeDataset, str]:
    from reflexarc.contract.policy_contract import LIBERO_STATE_EEF
    from reflexarc.data.lerobot.dataset import is_lerobot, open_lerobot
    from reflexarc.data.libero_hdf5 import open_libero

    folders = [path for path in paths if is_lerobot(path)]
    if not folders:
        return open_libero(paths), state or LIBERO_STATE_EEF.layout
    if len(paths) > 1:
        raise ConfigError("reflexarc data stats takes one LeRobot folder at a time")
    dataset = open_lerobot(folders[0], state=_parts(state), action=_parts(action))
    from_libero = dataset.libero is not None and state
    return dataset, dataset.layout(state if from_libero else LIBERO_STATE_EEF.layout)


def _parts(text: str) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] or None


def _labels(text: str) -> Labels:
    if text == "executed":
        return "executed"
    if text == "expert":
        return "expert"
    raise ConfigError(f"--labels {text!r}: give executed or expert")


def _table(title: str, feature: FeatureStatistics) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("dimension")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for index, name in enumerate(feature.names):
        values = (getattr(feature, column)[index] for column in _COLUMNS)
        table.add_row(name, *(f"{value:.4f}" for value in values))
    return table
