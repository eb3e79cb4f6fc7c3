"""How long a batch takes, learned from those that ran."""

from __future__ import annotations

import math
from bisect import bisect_left

_WEIGHT = 0.25  # of the newest batch


class BatchCost:
    """Mean and mean deviation of the seconds that a batch of each size takes.

    Sizes that never ran are interpolated. Beyond the largest the last slope goes on, so that a
    policy of which only single rows are known is taken to batch for free until it shows better.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._means: dict[int, float] = {}
        self._deviations: dict[int, float] = {}

    def observe(self, rows: int, seconds: float) -> None:
        if rows not in self._means:
            self._sizes.insert(bisect_left(self._sizes, rows), rows)
            self._means[rows], self._deviations[rows] = seconds, 0.0
            return
        error = seconds - self._means[rows]
        self._means[rows] += _WEIGHT * error
        self._deviations[rows] += _WEIGHT * (abs(error) - self._deviations[rows])

    def expect(self, rows: int) -> float:
        """Seconds of a batch of ``rows``; 0 while nothing is known.

        Never more than a larger batch takes: a size that runs seldom, as single rows under load,
        may have been slow by chance when it last did.
        """
        larger = self._sizes[bisect_left(self._sizes, rows) :]
        return min(self._alone(rows), *(self._means[size] for size in larger), math.inf)

    def _alone(self, rows: int) -> float:
        """By what is known of this size, or of its neighbours."""
        if rows in self._means:
            return self._means[rows]
        if not self._sizes:
            return 0.0
        place = bisect_left(self._sizes, rows)
        if place == 0:
            return self._means[self._sizes[0]]
        if place == len(self._sizes):
            if place == 1:
                return self._means[self._sizes[0]]
            place -= 1
        below, above = self._sizes[place - 1], self._sizes[place]
        slope = max(0.0, (self._means[above] - self._means[below]) / (above - below))
        return self._means[below] + slope * (rows - below)

    def cautious(self, rows: int) -> float:
        """Seconds within which most batches of ``rows`` end."""
        larger = self._sizes[bisect_left(self._sizes, rows) :]
        return min(
            self._alone(rows) + self._deviations.get(rows, 0.0),
            *(self._means[size] + self._deviations[size] for size in larger),
            math.inf,
        )
