"""Intervals for success rates and for the difference of two arms on the same initial states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence limits, all on the same scale."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedCounts:
    """How two arms ended on the same initial states.

    Attributes:
        both: both succeeded.
        first_only: only the first arm succeeded.
        second_only: only the second arm succeeded.
        neither: none succeeded.
    """

    both: int
    first_only: int
    second_only: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.first_only + self.second_only + self.neither

    @classmethod
    def from_outcomes(cls, outcomes: Sequence[tuple[bool, bool]]) -> PairedCounts:
        """Count pairs ``(first arm's success, second arm's success)``."""
        return cls(
            both=sum(first and second for first, second in outcomes),
            first_only=sum(first and not second for first, second in outcomes),
            second_only=sum(second and not first for first, second in outcomes),
            neither=sum(not first and not second for first, second in outcomes),
        )


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a rate. ValueError for no trials."""
    if trials == 0:
        raise ValueError("a rate needs at least one trial")
    limits = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(successes / trials, float(limits.low), float(limits.high))


def paired_difference(counts: PairedCounts, confidence: float = 0.95) -> Interval:
    """First arm's rate minus the second's, with Newcombe's hybrid score interval.

    Method 10 of R. G. Newcombe, "Improved confidence intervals for the difference between
    binomial proportions based on paired data", Statistics in Medicine 17 (1998), 2635-2650:
    Wilson's limits of the two rates, squared and added, less their correlation, whose numerator
    is corrected for continuity where it is positive. ValueError for no pairs.
    """
    n = counts.total
    first = wilson_interval(counts.both + counts.first_only, n, confidence)
    second = wilson_interval(counts.both + counts.second_only, n, confidence)
    difference = (counts.first_only - counts.second_only) / n
    phi = _corrected_correlation(counts)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    below = distance(first.estimate - first.low, second.high - second.estimate)
    above = distance(first.high - first.estimate, second.estimate - second.low)
    return Interval(difference, max(-1.0, difference - below), min(1.0, difference + above))


def _corrected_correlation(counts: PairedCounts) -> float:
    a, b, c, d = counts.both, counts.first_only, counts.second_only, counts.neither
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    numerator = float(a * d - b * c)
    if numerator > 0:
        numerator = max(numerator - counts.total / 2, 0.0)
    return numerator / math.sqrt(margins)


def mcnemar_exact(counts: PairedCounts) -> float:
    """Two-sided exact McNemar p-value: are the discordant pairs split evenly?"""
    discordant = counts.first_only + counts.second_only
    if discordant == 0:
        return 1.0
    return float(binomtest(counts.first_only, discordant, 0.5).pvalue)
