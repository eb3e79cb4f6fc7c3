"""Which reporters a run has."""

from __future__ import annotations

from reflexarc.training.config import Recipe
from reflexarc.training.reporting.metrics_file import MetricsFile
from reflexarc.training.reporting.reporter import Reporters, RunReporter
from reflexarc.training.reporting.tensorboard_events import (
    TensorBoardEvents,
    tensorboard_is_installed,
)
from reflexarc.training.reporting.text_log import TextLog
from reflexarc.training.reporting.weights_and_biases import (
    WeightsAndBiases,
    key_is_set,
    wandb_is_installed,
)
from reflexarc.training.run_folder import RunFolder


def open_reporters(run: RunFolder, recipe: Recipe, *, step: int = 0) -> Reporters:
    """Everything that the recipe and the environment ask for; whoever calls this closes it.

    Of several processes the first alone opens them; the others take ``Reporters()``. Open them
    after the run was resumed: what was reported beyond ``step`` is forgotten.

    Args:
        run: where to write; its folder exists.
        recipe: with ``reporting``.
        step: optimiser steps that the run has done.

    Raises ConfigError or MissingExtraError when the recipe insists on what is not installed.
    """
    log = TextLog(run.log)
    members: list[RunReporter] = [MetricsFile(run, step=step), log]
    asked = recipe.reporting
    if asked.tensorboard or (asked.tensorboard is None and tensorboard_is_installed()):
        members.append(TensorBoardEvents(run.tensorboard, step=step))
    elif asked.tensorboard is None:
        log.message("tensorboard is not installed, no events are written: pip install tensorboard")
    if asked.wandb or (asked.wandb is None and key_is_set() and wandb_is_installed()):
        members.append(WeightsAndBiases(run, recipe))
    elif asked.wandb is None and key_is_set():
        log.message("WANDB_API_KEY is set, but wandb is not installed: pip install wandb")
    return Reporters(members)
