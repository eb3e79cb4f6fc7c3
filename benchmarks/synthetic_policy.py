"""Policies that stand in for a device: a batch takes a stated time, whatever is in it.

    serve-policy --policy benchmarks.synthetic_policy:SmallImages

They sleep, as a thread does that waits for a GPU. ``Busy`` computes instead, as on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from reflexarc.contract import Observation
from reflexarc.server import libero_contract

BATCH_MS = 25.0


class SmallImages:
    """``milliseconds`` a batch and ``row_milliseconds`` more a row; images of 32 px (6 kB)."""

    image_size = 32
    milliseconds = BATCH_MS

    def __init__(self, milliseconds: float | None = None, row_milliseconds: float = 0.0) -> None:
        self.contract = libero_contract(image_size=self.image_size)
        self._seconds = (self.milliseconds if milliseconds is None else milliseconds) / 1000
        self._row_seconds = row_milliseconds / 1000

    def infer(self, observation: Observation) -> np.ndarray[Any, Any]:
        (actions,) = self.infer_batch([observation])
        return actions

    def infer_batch(self, observations: Sequence[Observation]) -> list[np.ndarray[Any, Any]]:
        self._compute(self._seconds + self._row_seconds * len(observations))
        return [np.zeros((10, 7), np.float32) for _ in observations]

    def _compute(self, seconds: float) -> None:
        if seconds:
            time.sleep(seconds)


class LargeImages(SmallImages):
    """The same with two images of 224 px (301 kB)."""

    image_size = 224


class SmallNull(SmallImages):
    """Answers at once."""

    milliseconds = 0.0


class LargeNull(LargeImages):
    """Answers at once."""

    milliseconds = 0.0


class Busy(SmallImages):
    """Computes for as long, in numpy, which lets other threads run meanwhile."""

    def _compute(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        matrix = np.ones((128, 128), np.float32)
        while time.perf_counter() < end:
            matrix @ matrix
