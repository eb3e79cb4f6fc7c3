"""``reflexarc checkpoint probe DIR --data PATH``: what a linear probe reads out of z."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import checkpoint_app
from reflexarc.contract.errors import ConfigError


@checkpoint_app.command()
def probe(
    directory: Annotated[
        Path, typer.Argument(help="A checkpoint's folder, or a run's with its best or last.")
    ],
    data: Annotated[list[Path], typer.Option(help="Demonstration file or folder; repeatable.")],
    output: Annotated[
        Path, typer.Option(help="Folder for probe.json, probe.md and probe.png.")
    ] = Path("outputs/probe"),
    episodes: Annotated[
        int | None,
        typer.Option(min=2, help="Fit on at most this many episodes of each task."),
    ] = None,
    horizons: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            help="Control steps ahead, such as 4,8,12; by default 1, 5 and 10, each rounded up "
            "to what the data has images for.",
        ),
    ] = None,
    feature_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of frame features, as reflexarc train fills it."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of folds, resamples and random weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all cores by default.")
    ] = None,
) -> None:
    """Does the representation see? Linear probes, skill at foreseeing, collapse, a picture."""
    require("reflexarc checkpoint probe", "train", "torch", "h5py", "safetensors", "tqdm")
    from rich.console import Console

    from reflexarc.policy.checkpoint import load_checkpoint
    from reflexarc.policy.devices import resolve_device
    from reflexarc.training.probe import report, run
    from reflexarc.training.session import use_threads

    options = run.ProbeOptions(
        data=tuple(data),
        per_task=episodes,
        horizons=None if horizons is None else _steps(horizons),
        feature_cache=feature_cache,
        seed=seed,
    )
    use_threads(threads)
    loaded = load_checkpoint(directory, resolve_device(device))
    run.check_output(output, loaded)
    result = run.probe(loaded, options)
    console = Console()
    for remark in result.split.remarks:
        console.print(f"Note: {remark}.")
    for table in report.terminal_tables(result):
        console.print(table)
    paths = run.write_result(result, output, report.markdown(result))
    console.print(f"Written: {', '.join(map(str, paths))}")


def _steps(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"--horizons {text!r} must be whole control steps above 0, such as 4,8,12",
            field="horizons",
        )
    return tuple(int(part) for part in parts)
