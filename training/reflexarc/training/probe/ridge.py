"""Ridge regression whose strength is chosen by cross-validation over whole episodes.

Closed form from the Gram matrix: one eigendecomposition gives every strength and every target, and
a fold's Gram matrix is subtracted from the total instead of being computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

STRENGTHS: Floats = np.logspace(-6, 2, 17)
"""Per sample, on inputs of unit deviation: 1 shrinks a direction of mean variance by half."""

_SMALLEST_DEVIATION = 1e-9


@dataclass(frozen=True)
class RidgeFit:
    """``predict(x) = (x - mean) / deviation @ weights + intercept``.

    Attributes:
        mean, deviation: ``(d,)`` of the inputs it was fitted on.
        weights: ``(d, m)``.
        intercept: ``(m,)``.
        strengths: the one chosen for each target.
    """

    mean: Floats
    deviation: Floats
    weights: Floats
    intercept: Floats
    strengths: tuple[float, ...]

    def predict(self, x: npt.NDArray[np.floating[Any]]) -> Floats:
        """``(n, d)`` to ``(n, m)``."""
        scaled = (np.asarray(x, dtype=np.float64) - self.mean) / self.deviation
        predicted: Floats = scaled @ self.weights + self.intercept
        return predicted


@dataclass(frozen=True)
class _Moments:
    """Sums over rows: all that ridge regression needs of them."""

    count: float
    x: Floats
    y: Floats
    xx: Floats
    xy: Floats

    @classmethod
    def of(cls, x: Floats, y: Floats) -> _Moments:
        return cls(float(len(x)), x.sum(0), y.sum(0), x.T @ x, x.T @ y)

    def __sub__(self, other: _Moments) -> _Moments:
        return _Moments(
            self.count - other.count,
            self.x - other.x,
            self.y - other.y,
            self.xx - other.xx,
            self.xy - other.xy,
        )

    def solve(self) -> tuple[Floats, Floats]:
        """Weights ``(strengths, d, m)`` and intercepts ``(strengths, m)``."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        variances, directions = np.linalg.eigh(self.xx / self.count - np.outer(mean_x, mean_x))
        along = directions.T @ (self.xy / self.count - np.outer(mean_x, mean_y))
        shrunk = 1.0 / (np.maximum(variances, 0.0) + STRENGTHS[:, None])
        weights = directions @ (shrunk[:, :, None] * along)
        return weights, mean_y - np.einsum("d,sdm->sm", mean_x, weights)


def fit_ridge(
    x: npt.NDArray[np.floating[Any]],
    y: Floats,
    episodes: Integers,
    widths: Sequence[int],
    *,
    folds: int = 5,
    seed: int = 0,
) -> RidgeFit:
    """Fit, each target with the strength that predicts episodes left out of the fit best.

    Args:
        x: inputs ``(n, d)``.
        y: targets side by side ``(n, m)``.
        episodes: ``(n,)``, the episode of each row; at least two different ones.
        widths: columns of each target; they add up to m. A target has one strength.
        folds: at most; fewer where there are fewer episodes.
    """
    if len(np.unique(episodes)) < 2:
        raise ValueError("cross-validation over episodes needs at least two of them")
    raw = np.asarray(x, dtype=np.float64)
    mean, spread = raw.mean(0), raw.std(0)
    deviation = np.where(spread < _SMALLEST_DEVIATION, 1.0, spread)
    scaled = (raw - mean) / deviation
    total = _Moments.of(scaled, y)
    errors = np.zeros((len(STRENGTHS), y.shape[1]))
    for rows in _folds(episodes, folds, seed):
        weights, intercepts = (total - _Moments.of(scaled[rows], y[rows])).solve()
        predicted = np.einsum("nd,sdm->snm", scaled[rows], weights, optimize=True)
        errors += np.square(predicted + intercepts[:, None] - y[rows]).sum(1)
    all_weights, all_intercepts = total.solve()
    weights = np.empty(all_weights.shape[1:])
    intercept = np.empty(y.shape[1])
    chosen = []
    stops = np.cumsum(widths)
    for start, stop in zip(stops - np.asarray(widths), stops, strict=True):
        best = int(errors[:, start:stop].sum(1).argmin())
        weights[:, start:stop] = all_weights[best, :, start:stop]
        intercept[start:stop] = all_intercepts[best, start:stop]
        chosen.append(float(STRENGTHS[best]))
    return RidgeFit(mean, deviation, weights, intercept, tuple(chosen))


def _folds(episodes: Integers, folds: int, seed: int) -> list[npt.NDArray[np.bool_]]:
    """``bool (n,)`` a fold: the rows of its episodes."""
    distinct = np.unique(episodes)
    order = np.random.default_rng(seed).permutation(distinct)
    parts = np.array_split(order, min(folds, len(distinct)))
    return [np.isin(episodes, part) for part in parts]
