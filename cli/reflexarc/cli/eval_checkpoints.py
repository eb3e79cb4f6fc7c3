"""``reflexarc eval checkpoints``: validation loss against success, of one run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reflexarc.cli.eval_compare import arm_named
from reflexarc.cli.extras import require
from reflexarc.cli.groups import eval_app
from reflexarc.contract.errors import ConfigError


@eval_app.command("checkpoints")
def checkpoints(
    run: Annotated[Path, typer.Argument(help="Folder of the run, with its checkpoints.")],
    results: Annotated[
        list[Path], typer.Argument(help="--output folders of eval libero, one a checkpoint.")
    ],
    metric: Annotated[str, typer.Option(help="Of the run's validation; less is better.")] = "total",
    arm: Annotated[str, typer.Option(help="Whose success.")] = "policy",
    output: Annotated[
        Path, typer.Option(help="Folder for checkpoints.md, checkpoints.json and checkpoints.png.")
    ] = Path("outputs/checkpoints"),
) -> None:
    """Whether the checkpoint of the least validation loss is the one that succeeds most."""
    require("reflexarc eval checkpoints", "sim", "matplotlib", "scipy")
    import json

    from reflexarc.eval.checkpoint_plot import (
        checkpoint_points,
        markdown,
        validation_values,
        write_checkpoint_plot,
    )
    from reflexarc.eval.offline_summary import write_atomically
    from reflexarc.policy.checkpoint_files import read_manifest

    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"{run} holds no metrics.jsonl; name a run's folder", field="run")
    steps = {
        read_manifest(folder)[1]: int(folder.name.removeprefix("step_"))
        for folder in sorted((run / "checkpoints").glob("step_*"))
    }
    points = checkpoint_points(steps, validation_values(metrics, metric), results, arm_named(arm))
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(points, metric)
    values = {"metric": metric, "arm": arm, "checkpoints": [p.model_dump() for p in points]}
    write_atomically(output / "checkpoints.md", text.encode())
    write_atomically(output / "checkpoints.json", json.dumps(values, indent=1).encode())
    write_checkpoint_plot(points, metric, output / "checkpoints.png")
    typer.echo(text)
    typer.echo(f"Written: {output}/checkpoints.md, checkpoints.json, checkpoints.png")
