"""How a run stands, read from its folder without loading anything heavy."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from reflexarc.contract.errors import ConfigError
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.runs.process import is_locked, read_process

State = Literal["running", "complete", "stopped", "died"]
_DEEPEST = 3
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class RunOverview:
    """One row of ``reflexarc runs list``; None stands for what is not known yet.

    Attributes:
        path, name: the folder; the recipe's name, with its stage.
        state: ``running`` while a process holds the lock; ``died`` when it was killed or failed.
        reason: why it failed, where it could say so.
        step, epoch: of the last line of metrics, or of the last checkpoint where that is later, as
            of a run that was stopped between two lines.
        total_steps, loss, samples_per_second: of the last line of metrics.
        best_metric, best_value, best_step: of held-out episodes.
        seconds_since: since something was last written of it.
    """

    path: Path
    name: str
    state: State
    reason: str | None
    step: int | None
    total_steps: int | None
    epoch: float | None
    loss: float | None
    samples_per_second: float | None
    best_metric: str | None
    best_value: float | None
    best_step: int | None
    seconds_since: float


def find_runs(directory: Path) -> list[Path]:
    """Folders of runs: ``directory`` itself, or those inside it to a depth of 3, by name.

    Raises ConfigError when there is no such folder.
    """
    if not directory.is_dir():
        raise ConfigError(
            f"there is no folder {directory}; name the one that holds the runs (reflexarc train "
            "writes to runs/ when no --output is given)",
            field="directory",
        )
    return list(_runs_in(directory, _DEEPEST))


def require_run(folder: Path) -> RunFolder:
    """The run of a folder; ConfigError when none stands there."""
    run = RunFolder(folder)
    if not folder.is_dir() or not run.has_run():
        raise ConfigError(
            f"{folder} holds no training run: it has no {run.recipe.name}; "
            "'reflexarc runs list' shows which there are",
            field="run",
        )
    return run


def read_overview(folder: Path) -> RunOverview:
    """How the run of a folder stands now; a damaged file leaves gaps and raises nothing."""
    run = RunFolder(folder)
    recipe = _recipe(run)
    state, reason = state_of(run)
    line = _last_training_line(run.metrics)
    logged, epoch = line.get("step"), line.get("epoch")
    total_steps = _total_steps(recipe, logged, epoch)
    step = max(logged or 0, _saved_step(run)) or None
    if epoch and logged and step:
        epoch *= step / logged
    best = _best(run)
    return RunOverview(
        path=folder,
        name=_name(recipe, folder),
        state=state,
        reason=reason,
        step=step,
        total_steps=total_steps,
        epoch=epoch,
        loss=line.get("total"),
        samples_per_second=line.get("samples_per_second"),
        best_metric=best.get("name"),
        best_value=best.get("value"),
        best_step=best.get("step"),
        seconds_since=max(0.0, time.time() - _last_written(run)),
    )


def state_of(run: RunFolder) -> tuple[State, str | None]:
    """Whether a run trains, is complete, was stopped or died, and of what."""
    if is_locked(run.path):
        return "running", None
    if run.summary.is_file():
        return "complete", None
    process = read_process(run.path)
    if process is None:
        return "died", None
    if process.ended == "finished":
        return "stopped", None
    return "died", process.reason or "it was killed"


def _runs_in(directory: Path, depth: int) -> Iterator[Path]:
    if RunFolder(directory).has_run():
        yield directory
        return
    if depth == 0:
        return
    for child in sorted(directory.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
            yield from _runs_in(child, depth - 1)


def _recipe(run: RunFolder) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _name(recipe: Mapping[str, Any], folder: Path) -> str:
    name, stage = recipe.get("name"), recipe.get("stage")
    if not isinstance(name, str):
        return folder.name
    return f"{name} (stage {stage['number']})" if isinstance(stage, dict) else name


def _total_steps(recipe: Mapping[str, Any], step: int | None, epoch: float | None) -> int | None:
    loop = recipe.get("training") or {}
    if loop.get("steps"):
        return int(loop["steps"])
    if not loop.get("epochs") or not step or not epoch:
        return None
    return round(int(loop["epochs"]) * step / epoch)


def _last_training_line(metrics: Path) -> Mapping[str, Any]:
    """The last whole line of kind ``train``, from the end of a file that may be long."""
    try:
        with metrics.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and values.get("kind") == "train":
            return values
    return {}


def _saved_step(run: RunFolder) -> int:
    """Of the checkpoint that ``last`` names; 0 where there is none."""
    try:
        last = run.pointed("last")
    except (ConfigError, OSError, ValueError):
        return 0
    digits = "" if last is None else last.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else 0


def _best(run: RunFolder) -> Mapping[str, Any]:
    """What the newest checkpoint says of the best so far."""
    try:
        last = run.pointed("last")
        if last is None:
            return {}
        manifest = json.loads((last / "policy.json").read_text(encoding="utf-8"))
        found = manifest["provenance"]["best_metric"]
    except (ConfigError, OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_written(run: RunFolder) -> float:
    files = (run.metrics, run.log, run.summary, run.recipe)
    return max((path.stat().st_mtime for path in files if path.is_file()), default=time.time())
