"""Events for TensorBoard in the run's folder ``tensorboard/``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from reflexarc.contract.errors import MissingExtraError


def tensorboard_is_installed() -> bool:
    return find_spec("tensorboard") is not None


class TensorBoardEvents:
    """Scalars ``train/<name>`` and ``validation/<name>`` by optimiser step.

    Args:
        folder: of the events; one file a process that trained.
        step: optimiser steps that the run has done. TensorBoard is told to forget what an
            earlier process wrote beyond it, so that no step stands there twice.

    Raises MissingExtraError when tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        if not tensorboard_is_installed():
            raise MissingExtraError("reporting.tensorboard", "train", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        purge_step = step + 1 if folder.is_dir() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def train(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        self._write("train", step, {"epoch": epoch, **values})

    def validation(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        self._write("validation", step, values)

    def message(self, text: str) -> None:
        """Nothing: TensorBoard shows numbers."""

    def close(self) -> None:
        self._writer.close()

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        # Else a kill loses up to two minutes that metrics.jsonl and the checkpoint have.
        self._writer.flush()
