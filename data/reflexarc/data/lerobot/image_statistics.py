"""Sums over the pixels of sampled images, from which LeRobot's statistics of a camera follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

_EVERY, _PIXELS = 10, 4


@dataclass
class ImageSums:
    """Per channel, over every 10th image and every 4th pixel both ways; values 0 to 255."""

    images: int = 0
    pixels: int = 0
    total: list[float] = field(default_factory=lambda: [0.0] * 3)
    squares: list[float] = field(default_factory=lambda: [0.0] * 3)
    histogram: list[list[int]] = field(default_factory=lambda: [[0] * 256 for _ in range(3)])

    def add_sampled(self, image: npt.NDArray[np.uint8], step: int) -> None:
        """Count the image at ``step`` of an episode, where it is one of those sampled."""
        if step % _EVERY:
            return
        values = image[::_PIXELS, ::_PIXELS].reshape(-1, 3)
        self.images += 1
        self.pixels += len(values)
        for channel in range(3):
            counts = np.bincount(values[:, channel], minlength=256)
            levels = np.arange(256)
            self.total[channel] += float(counts @ levels)
            self.squares[channel] += float(counts @ levels**2)
            self.histogram[channel] = (np.array(self.histogram[channel]) + counts).tolist()

    def merge(self, other: ImageSums) -> None:
        self.images += other.images
        self.pixels += other.pixels
        self.total = (np.array(self.total) + other.total).tolist()
        self.squares = (np.array(self.squares) + other.squares).tolist()
        self.histogram = (np.array(self.histogram) + np.array(other.histogram)).tolist()

    def to_lerobot(self) -> dict[str, Any]:
        """Mean, deviation, extremes and quantiles of values in 0 to 1, each ``(3, 1, 1)``."""
        mean = np.array(self.total) / self.pixels
        deviation = np.sqrt(np.maximum(np.array(self.squares) / self.pixels - mean**2, 0))
        share = np.cumsum(np.array(self.histogram), axis=1) / self.pixels
        levels = {
            name: np.argmax(share >= quantile, axis=1)
            for name, quantile in (
                ("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99),
            )
        }  # fmt: skip
        seen = np.array(self.histogram) > 0
        levels["min"] = seen.argmax(axis=1)
        levels["max"] = 255 - seen[:, ::-1].argmax(axis=1)
        values = {"mean": mean, "std": deviation, **levels}
        return {
            **{name: (np.asarray(v) / 255).reshape(3, 1, 1).tolist() for name, v in values.items()},
            "count": [self.images],
        }
