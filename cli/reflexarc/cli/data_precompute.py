"""``reflexarc data precompute``: frame features of a recipe, ahead of training."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import data_app
from reflexarc.cli.recipe_options import Data, Overrides, RecipeName, with_data

if TYPE_CHECKING:
    from rich.table import Table

    from reflexarc.training.feature_store.precompute import FeaturePlan
    from reflexarc.training.feature_store.store import FrameFeatures


@data_app.command()
def precompute(
    recipe: RecipeName,
    data: Data = None,
    set_: Overrides = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Another suite than the recipe's: --set data.suite=..., its own folder."),
    ] = None,
    feature_cache: Annotated[
        Path,
        typer.Option(
            "--feature-cache",
            "--output",
            help="Folder of frame features, as training is given it.",
        ),
    ] = Path("runs/feature_cache"),
    dtype: Annotated[
        str | None,
        typer.Option(help="fp16, bf16 or fp32; the same as --set data.feature_dtype=..."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; each loads the encoder.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads in all; all cores by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print size and free disk, and stop.")
    ] = False,
) -> None:
    """Run the frozen part of a recipe's policy over every frame, once.

    Run the same command again after an interruption, or at the same time in other terminals:
    what is done is kept, and nothing is computed twice. What was done is printed as one line of
    JSON; everything for people goes to standard error.
    """
    require("reflexarc data precompute", "train", "torch", "yaml", "safetensors", "tqdm")
    from rich.console import Console

    from reflexarc.policy.devices import resolve_device
    from reflexarc.policy.memory import keep_freed_memory
    from reflexarc.training.feature_store.building import check_room
    from reflexarc.training.feature_store.precompute import plan_features
    from reflexarc.training.feature_store.precompute import precompute as compute_features
    from reflexarc.training.preparation import prepare
    from reflexarc.training.recipe_files import load_recipe, recipe_stages
    from reflexarc.training.session import use_threads

    console = Console(stderr=True)
    keep_freed_memory()
    cores = use_threads(threads)
    overrides = [
        *(set_ or []),
        *([f"data.suite={suite}"] if suite else []),
        *([f"data.feature_dtype={dtype}"] if dtype else []),
    ]
    # The stages of a recipe share data, contract and encoder, and so their features.
    loaded = load_recipe(recipe, overrides, stage=1 if recipe_stages(recipe) else None)
    preparation = prepare(with_data(loaded, data), resolve_device(device))
    plan = plan_features(preparation, feature_cache)
    console.print(_plan_table(loaded.name, plan))
    if dry_run:
        typer.echo(json.dumps(plan.to_json()))
        return
    check_room(feature_cache, plan.bytes_to_write)
    began = time.monotonic()
    features = compute_features(
        preparation, feature_cache, workers=workers, threads=max(1, cores // workers)
    )
    summary = _summary(plan, features, workers, time.monotonic() - began)
    console.print(_summary_table(summary))
    typer.echo(json.dumps(summary))


def _summary(
    plan: FeaturePlan, features: FrameFeatures, workers: int, seconds: float
) -> dict[str, Any]:
    computed = features.needed - features.found
    return {
        "path": str(features.path),
        "rows": features.needed,
        "rows_found": features.found,
        "rows_computed": computed,
        "bytes": plan.bytes,
        "dtype": plan.dtype,
        "arrays": plan.arrays,
        "encoders": plan.encoders,
        "workers": workers,
        "seconds": round(seconds, 3),
        "rows_per_second": round(computed / seconds, 2) if computed else None,
    }


def _plan_table(name: str, plan: FeaturePlan) -> Table:
    encoders = "\n".join(
        f"{path}: {encoder['id']} {encoder['revision']} {encoder['sha256'][:12]}".replace("  ", " ")
        for path, encoder in plan.encoders.items()
    )
    rows = {
        "frozen encoders": encoders or "none",
        "arrays": "\n".join(f"{name}: {shape}" for name, shape in plan.arrays.items()),
        "frames": f"{plan.rows:,}, of which {plan.rows_found:,} are found",
        "size": _size(plan.bytes),
        "still to write": _size(plan.bytes_to_write),
        "disk free": _size(plan.disk_free) + ("" if plan.fits else "  [bold red]not enough"),
        "store": plan.path,
    }
    if plan.nearest:
        rows["not taken"] = plan.nearest
    return _table(f"frame features of {name}", rows)


def _summary_table(summary: dict[str, Any]) -> Table:
    rate = summary["rows_per_second"]
    rows = {
        "frames": f"{summary['rows']:,}: {summary['rows_found']:,} found, "
        f"{summary['rows_computed']:,} computed",
        "time": f"{summary['seconds']:.1f} s" + (f", {rate:.1f} frames/s" if rate else ""),
        "size": f"{_size(summary['bytes'])}, {summary['dtype']}",
        "store": summary["path"],
    }
    return _table("features complete", rows)


def _table(title: str, rows: dict[str, str]) -> Table:
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
