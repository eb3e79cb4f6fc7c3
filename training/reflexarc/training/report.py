"""Tables for a person at a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.table import Table

from reflexarc.training.config import StageInfo
from reflexarc.training.estimate import Estimate
from reflexarc.training.outcome import Outcome
from reflexarc.training.preparation import Preparation


def plan_table(preparation: Preparation, found: Estimate) -> Table:
    """What ``--dry-run`` prints."""
    recipe = preparation.recipe
    tasks = sorted({episode.task_name for episode in preparation.episodes})
    table = _table(f"plan of {recipe.name}")
    stage = recipe.stage
    rows = {
        **({} if stage is None else {"stage": _stage(stage, preparation.origin)}),
        **({"frozen modules": ", ".join(recipe.freeze)} if recipe.freeze else {}),
        "tasks": "\n".join(tasks),
        "episodes": f"{len(preparation.train_episodes)} to train on, "
        f"{len(preparation.held_out_episodes)} held out",
        "samples": f"{found.train_samples} to train on, {found.held_out_samples} held out",
        "steps per epoch": f"{found.steps_per_epoch} of {found.batch_size} samples",
        "steps": str(found.total_steps),
        "trainable parameters": f"{found.trained_parameters:,}",
        "frozen parameters": f"{found.frozen_parameters:,}",
        "estimated memory": _memory(found),
        **_time(found),
        "checkpoint size": _size(found.checkpoint),
        "frame features": _size(found.features)
        + (" (cached: hit)" if found.features_cached else " (to be computed)"),
        "disk needed": _size(found.disk_needed),
        "disk free": _size(found.disk_free)
        + ("" if found.disk_free > found.disk_needed else "  [bold red]not enough"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _memory(found: Estimate) -> str:
    """Of one process: the sum, and every part that is a hundredth of it."""
    whole = found.memory.total
    lines = [_size(whole)]
    for field in fields(found.memory):
        size = getattr(found.memory, field.name)
        if field.name == "activations":
            lines.append(f"activations {_size(size)}, of {found.rows} samples at once")
        elif 100 * size >= whole:
            lines.append(f"{field.name} {_size(size)}")
    return "\n".join(lines)


def _time(found: Estimate) -> dict[str, str]:
    if found.step_seconds is None:
        return {}
    whole = found.step_seconds * found.total_steps
    shown = f"{whole / 3600:.1f} h" if whole >= 3600 else f"{whole / 60:.1f} min"
    return {"estimated time": f"{shown}, {found.step_seconds:.3g} s a step"}


def _stage(stage: StageInfo, origin: Mapping[str, Any] | None) -> str:
    if stage.from_scratch:
        begins = "from random weights, nothing frozen"
    elif origin is not None:
        begins = (
            f"from {origin['fingerprint'][:12]}…, step {origin['step']} of stage {stage.number - 1}"
        )
    else:
        begins = "from random weights" if stage.number == 1 else "from no weights yet"
    return f"{stage.number} of {len(stage.names)} ({stage.name}), {begins}"


def summary_table(outcome: Outcome, output: Path) -> Table:
    """What a run ends with."""
    table = _table("training complete" if outcome.stopped_by is None else "training stopped")
    progress = outcome.progress
    table.add_row("steps", f"{progress.step} of {outcome.total_steps}")
    table.add_row("epochs", f"{progress.step / outcome.steps_per_epoch:.2f}")
    table.add_row("time", f"{progress.seconds / 60:.1f} min")
    if outcome.steps_run:
        table.add_row("samples/s", f"{outcome.samples_per_second:.1f}")
    for kind, metrics in (("training", progress.training), ("held out", progress.validation)):
        for name, value in metrics.items():
            table.add_row(f"{kind} {name}", f"{value:.5f}")
    if progress.best_metric is not None:
        table.add_row("best", f"{progress.best_metric:.5f} at step {progress.best_step}")
    for name, path in (("last", outcome.last), ("best", outcome.best)):
        if path is not None:
            table.add_row(f"checkpoint {name}", str(output / path.relative_to(output)))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
