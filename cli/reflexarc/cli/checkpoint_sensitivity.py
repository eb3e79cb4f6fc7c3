"""``reflexarc checkpoint sensitivity DIR --data PATH``: does the policy listen to every input?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import checkpoint_app

if TYPE_CHECKING:
    from rich.table import Table

    from reflexarc.training.probe.sensitivity import Sensitivity


@checkpoint_app.command()
def sensitivity(
    directory: Annotated[
        Path, typer.Argument(help="A checkpoint's folder, or a run's with its best or last.")
    ],
    data: Annotated[list[Path], typer.Option(help="Demonstration file or folder; repeatable.")],
    samples: Annotated[int, typer.Option(min=2, help="Frames, chosen at random.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of frames, partners and noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers as JSON.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all cores by default.")
    ] = None,
) -> None:
    """How far z and the chunk move when one modality is swapped with another frame's.

    Exits with 1 when an input moves neither or only one of them.
    """
    require("reflexarc checkpoint sensitivity", "train", "torch", "h5py", "safetensors", "tqdm")
    from rich.console import Console

    from reflexarc.policy.checkpoint import load_checkpoint
    from reflexarc.policy.devices import resolve_device
    from reflexarc.training.probe.sensitivity import choose_moments, measure_sensitivity
    from reflexarc.training.probe.split import known_tasks
    from reflexarc.training.session import use_threads

    use_threads(threads)
    loaded = load_checkpoint(directory, resolve_device(device))
    dataset, remarks = known_tasks(data, loaded.provenance)
    moments = choose_moments(loaded, dataset.episodes, samples, seed)
    found = measure_sensitivity(loaded, moments, seed)
    if as_json:
        typer.echo(json.dumps([asdict(one) | {"moves": one.moves} for one in found], indent=2))
    else:
        console = Console()
        for remark in remarks:
            console.print(f"Note: {remark}.")
        console.print(_table(found, len(moments.state)))
        if not moments.several_instructions:
            console.print("Note: all frames have one instruction, so language was not swapped.")
    if not all(one.moves for one in found):
        raise typer.Exit(1)


def _table(found: list[Sensitivity], frames: int) -> Table:
    from rich.table import Table

    table = Table(title=f"Another frame's instead, {frames} frames", title_justify="left")
    for column in ("input", "z moves", "of all", "chunk moves", "of all", "gripper", ""):
        table.add_column(column)
    for one in found:
        gripper = "-" if one.gripper is None else f"{one.gripper:.1%}"
        table.add_row(
            one.modality,
            f"{one.z:.3g}",
            f"{one.z_share:.0%}",
            f"{one.action:.3g}",
            f"{one.action_share:.0%}",
            gripper,
            "" if one.moves else "NOT HEARD",
        )
    return table
