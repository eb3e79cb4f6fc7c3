"""How well a probe reads a target on held-out episodes, with intervals over episodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reflexarc.training.probe.ridge import Floats, Integers

DRAWS = 2000
SMALLEST_SPREAD = 1e-3
"""Metres: of what moves less than this there is nothing to explain, and no R² is given."""


@dataclass(frozen=True)
class EpisodeSums:
    """Sums of squares over the frames of each of E episodes, in square metres.

    Attributes:
        errors: ``(E,)`` of predicted minus real.
        spread: ``(E,)`` of real minus the training episodes' mean.
        frames: ``(E,)``.
    """

    errors: Floats
    spread: Floats
    frames: Floats

    @classmethod
    def over(
        cls, errors: Floats, spread: Floats, episodes: Integers, among: Integers
    ) -> EpisodeSums:
        """From squares of every frame, ``(n,)``; ``among (E,)`` are the episodes in order."""
        place = np.searchsorted(among, episodes)
        size = len(among)
        return cls(
            np.bincount(place, errors, size).astype(np.float64),
            np.bincount(place, spread, size).astype(np.float64),
            np.bincount(place, minlength=size).astype(np.float64),
        )

    def spread_mm(self) -> float:
        return 1e3 * float(np.sqrt(self.spread.sum() / self.frames.sum()))

    def rmse_mm(self) -> float:
        return 1e3 * float(np.sqrt(self.errors.sum() / self.frames.sum()))

    def varies(self) -> bool:
        return self.spread_mm() >= 1e3 * SMALLEST_SPREAD

    def r2(self) -> float:
        return float(1 - self.errors.sum() / self.spread.sum())

    def resampled_r2(self, weights: Floats) -> Floats:
        """R² of every resample, ``(draws,)``; NaN where one holds nothing that varies."""
        with np.errstate(divide="ignore", invalid="ignore"):
            r2: Floats = 1 - (weights @ self.errors) / (weights @ self.spread)
        return np.where(np.isfinite(r2), r2, np.nan)


def resamples(strata: Integers, *, draws: int = DRAWS, seed: int = 0) -> Floats:
    """How often each of E episodes is drawn, ``(draws, E)``: with replacement within a stratum."""
    random = np.random.default_rng(seed)
    weights = np.zeros((draws, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        equal = np.full(len(members), 1 / len(members))
        weights[:, members] = random.multinomial(len(members), equal, size=draws)
    return weights


def interval(values: npt.NDArray[np.float64]) -> tuple[float, float] | None:
    """The middle 95 % of resampled values; None when most resamples give none."""
    finite = values[np.isfinite(values)]
    if len(finite) < len(values) / 2:
        return None
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)
