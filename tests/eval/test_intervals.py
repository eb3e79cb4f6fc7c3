"""Intervals against values that were published."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflexarc.eval.intervals import (
    PairedCounts,
    mcnemar_exact,
    paired_difference,
    wilson_interval,
)

# R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I: 81/263, 15/148, 0/20, 1/29.
PUBLISHED_WILSON = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
]

PUBLISHED_PAIRED = [
    # Newcombe, Statistics in Medicine 17 (1998), 2635-2650, method 10: 36, 12, 2, 0.
    (PairedCounts(36, 12, 2, 0), 0.2000, 0.0569, 0.3404),
    # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014): airway reactivity, N = 21.
    (PairedCounts(1, 1, 7, 12), -0.286, -0.507, -0.026),
    # Altman et al., Statistics with Confidence (2000), table 6.2: 12.2 %, 1.1 % to 22.6 %.
    (PairedCounts(14, 5, 0, 22), 0.122, 0.011, 0.226),
]


@pytest.mark.parametrize(("successes", "trials", "low", "high"), PUBLISHED_WILSON)
def test_wilson_gives_the_published_limits(
    successes: int, trials: int, low: float, high: float
) -> None:
    interval = wilson_interval(successes, trials)
    assert interval.estimate == successes / trials
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("counts", "difference", "low", "high"), PUBLISHED_PAIRED)
def test_paired_difference_gives_the_published_limits(
    counts: PairedCounts, difference: float, low: float, high: float
) -> None:
    interval = paired_difference(counts)
    digits = 5e-5 if low == 0.0569 else 5e-4
    assert (interval.estimate, interval.low, interval.high) == pytest.approx(
        (difference, low, high), abs=digits
    )


def test_a_clean_sweep_is_clearly_above_zero_and_never_above_one() -> None:
    """20 of 20 against 0 of 20: the Wald interval would have no width at all."""
    interval = paired_difference(PairedCounts(both=0, first_only=20, second_only=0, neither=0))
    assert interval.estimate == interval.high == 1.0
    assert 0.7 < interval.low < 1.0


def test_mcnemar_gives_the_published_p_value() -> None:
    """Armitage and Berry (1994), p. 127: 12 against 2 discordant pairs, exact two-sided 0.0129."""
    assert mcnemar_exact(PairedCounts(20, 12, 2, 16)) == pytest.approx(0.0129, abs=5e-5)
    assert mcnemar_exact(PairedCounts(5, 0, 0, 5)) == 1.0


def test_outcomes_are_counted_by_cell() -> None:
    outcomes = [(True, True), (True, False), (True, False), (False, True), (False, False)]
    assert PairedCounts.from_outcomes(outcomes) == PairedCounts(1, 2, 1, 1)


cells = st.integers(0, 60)


@given(cells, cells, cells, cells)
def test_intervals_hold_their_estimate_and_turn_with_the_arms(
    both: int, first: int, second: int, neither: int
) -> None:
    counts = PairedCounts(both, first, second, neither)
    if counts.total == 0:
        with pytest.raises(ValueError, match="at least one trial"):
            paired_difference(counts)
        return
    interval = paired_difference(counts)
    assert -1.0 <= interval.low <= interval.estimate <= interval.high <= 1.0
    turned = paired_difference(PairedCounts(both, second, first, neither))
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low), abs=1e-12)
