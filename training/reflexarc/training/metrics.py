"""Means and speed between two log lines, and the check that they are finite."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reflexarc.training.errors import TrainingDivergedError

Metrics = dict[str, float]


class Interval:
    """Sums up the steps between two log lines without waiting for the device."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self._samples = 0
        self._began = time.monotonic()

    def add(self, losses: Mapping[str, Tensor], samples: int) -> None:
        self.steps.append({name: value.detach() for name, value in losses.items()})
        self._samples += samples

    def close(self, step: int) -> tuple[Metrics, float]:
        """Means of the interval that ends at ``step``, and its samples a second."""
        names, table = self._table()
        self._refuse_not_finite(step, names, table)
        speed = self._samples / max(time.monotonic() - self._began, 1e-9)
        self.steps, self._samples = [], 0
        self.restart_clock()
        return dict(zip(names, table.mean(0).tolist(), strict=True)), speed

    def rows(self, step: int) -> list[Metrics]:
        """What was measured since the last line, one map a step, up to step ``step``."""
        if not self.steps:
            return []
        names, table = self._table()
        self._refuse_not_finite(step, names, table)
        return [dict(zip(names, row, strict=True)) for row in table.tolist()]

    def restore(self, rows: Sequence[Metrics], device: torch.device) -> None:
        """Go on from the ``rows`` of a process that stopped between two lines."""
        self.steps = [
            {name: torch.tensor(value, device=device) for name, value in row.items()}
            for row in rows
        ]

    def _table(self) -> tuple[list[str], Tensor]:
        """Names, and ``float32 (steps, names)``."""
        names = list(self.steps[0])
        rows = [torch.stack([row[n].float() for n in names]) for row in self.steps]
        return names, torch.stack(rows)

    @staticmethod
    def _refuse_not_finite(step: int, names: list[str], table: Tensor) -> None:
        first = step - len(table) + 1
        for offset, row in enumerate(table.tolist()):
            refuse_not_finite(dict(zip(names, row, strict=True)), f"in step {first + offset}")

    def restart_clock(self) -> None:
        """Leave out the time that validation or a checkpoint took."""
        self._began = time.monotonic()


def refuse_not_finite(values: Mapping[str, float], where: str) -> None:
    wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
    if wrong:
        listed = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise TrainingDivergedError(
            f"not finite {where}: {listed}. Nothing was overwritten; `last` is the checkpoint "
            "before. Lower optimizer.learning_rate, or set optimizer.gradient_clip",
            field=next(iter(wrong)),
        )
