"""``metrics.jsonl``: one JSON object a line, for programs."""

from __future__ import annotations

from collections.abc import Mapping

from reflexarc.training.run_folder import RunFolder


class MetricsFile:
    """Appends to the run's ``metrics.jsonl``; what a killed run wrote too much is dropped.

    Args:
        run: whose file.
        step: optimiser steps that the run has done; lines beyond it are forgotten.
    """

    def __init__(self, run: RunFolder, *, step: int = 0) -> None:
        self._run = run
        run.forget_metrics_after(step)

    def train(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        self._run.append_metrics({"kind": "train", "step": step, "epoch": epoch, **values})

    def validation(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        self._run.append_metrics({"kind": "validation", "step": step, "epoch": epoch, **values})

    def message(self, text: str) -> None:
        """Nothing: the file holds numbers."""

    def close(self) -> None:
        """Nothing: every line is on disk already."""
