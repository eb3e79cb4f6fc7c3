"""Weights & Biases, imported when a run reports there and not before."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from reflexarc.contract.errors import ConfigError
from reflexarc.training.config import Recipe
from reflexarc.training.run_folder import RunFolder, write_text


def wandb_is_installed() -> bool:
    return find_spec("wandb") is not None


def key_is_set() -> bool:
    """Whether the environment asks for Weights & Biases where the recipe says nothing."""
    return bool(os.environ.get("WANDB_API_KEY"))


class WeightsAndBiases:
    """One run there for one run folder, the same one after a resume.

    Its id stands in ``wandb_run_id``. Steps that a killed run had reported beyond its last
    checkpoint are not reported again: Weights & Biases ignores a step that is not above the last.

    Raises ConfigError naming what to install when the package is absent, or when it refuses.
    """

    def __init__(self, run: RunFolder, recipe: Recipe) -> None:
        if not wandb_is_installed():
            raise ConfigError(
                "reporting.wandb is true, but the package wandb is not installed; "
                "pip install wandb, or --set reporting.wandb=false",
                field="reporting.wandb",
            )
        wandb = import_module("wandb")
        try:
            self._run: Any = wandb.init(
                project=recipe.reporting.project,
                group=recipe.reporting.group,
                name=run.path.absolute().name,
                id=_run_id(run),
                resume="allow",
                dir=str(run.path),
                config=recipe.model_dump(mode="json"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases refused the run: {error}. Set WANDB_API_KEY or run "
                "'wandb login'; WANDB_MODE=offline keeps the run on this disk; "
                "--set reporting.wandb=false does without",
                field="reporting.wandb",
            ) from error

    def train(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        self._log("train", step, epoch, values)

    def validation(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        self._log("validation", step, epoch, values)

    def message(self, text: str) -> None:
        """Nothing: it captures the terminal by itself."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _log(self, kind: str, step: int, epoch: float, values: Mapping[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log({"epoch": epoch, **named}, step=step)


def _run_id(run: RunFolder) -> str:
    """The id that this folder's run has there, made when it has none yet."""
    if run.wandb_run_id.is_file():
        return run.wandb_run_id.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(8)
    write_text(run.wandb_run_id, f"{made}\n")
    return made
