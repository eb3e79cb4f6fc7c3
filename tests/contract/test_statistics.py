"""Statistics equal numpy's; normalisation maps to where it says and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from reflexarc.contract import FeatureStatistics, NormalizationStatistics

NAMES = ("x", "y", "z")
ROWS = np.random.default_rng(0).normal([0, 5, -1], [1, 0.1, 20], (1000, 3))


def statistics(rows: np.ndarray = ROWS) -> FeatureStatistics:
    return FeatureStatistics.from_rows(rows, NAMES)


def test_equal_numpys() -> None:
    got = statistics()
    assert got.count == 1000
    np.testing.assert_array_equal(got.mean, ROWS.mean(0))
    np.testing.assert_array_equal(got.std, ROWS.std(0))
    np.testing.assert_array_equal(got.min, ROWS.min(0))
    np.testing.assert_array_equal(got.max, ROWS.max(0))
    np.testing.assert_array_equal(got.q01, np.quantile(ROWS, 0.01, axis=0))
    np.testing.assert_array_equal(got.q99, np.quantile(ROWS, 0.99, axis=0))


def test_float32_rows_are_summed_in_float64() -> None:
    rows = np.full((300_000, 3), 16_777_216.0, np.float32)
    rows[1::2] += 2
    assert statistics(rows).mean[0] == 16_777_217.0


def test_mean_std() -> None:
    shift, scale = statistics().shift_and_scale("mean_std")
    normalised = (ROWS - shift) / scale
    np.testing.assert_allclose(normalised.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(normalised.std(0), 1, rtol=1e-12)


@pytest.mark.parametrize(("mode", "low", "high"), [("min_max", 0, 1), ("q01_q99", 0.01, 0.99)])
def test_ranges_map_to_plus_minus_one(mode: Any, low: float, high: float) -> None:
    shift, scale = statistics().shift_and_scale(mode)
    normalised = (ROWS - shift) / scale
    np.testing.assert_allclose(np.quantile(normalised, low, axis=0), -1, atol=1e-9)
    np.testing.assert_allclose(np.quantile(normalised, high, axis=0), 1, atol=1e-9)


def test_identity() -> None:
    shift, scale = statistics().shift_and_scale("identity")
    np.testing.assert_array_equal(shift, 0)
    np.testing.assert_array_equal(scale, 1)


@pytest.mark.parametrize("mode", ["mean_std", "min_max", "q01_q99"])
def test_a_constant_dimension_normalises_to_zero(mode: Any) -> None:
    rows = ROWS.copy()
    rows[:, 1] = 0.1 + 0.2  # rounding leaves a deviation of 1e-17, not 0
    shift, scale = statistics(rows).shift_and_scale(mode)
    assert scale[1] == 1.0
    np.testing.assert_allclose((rows[:, 1] - shift[1]) / scale[1], 0, atol=1e-12)
    assert np.isfinite((rows - shift) / scale).all()


def test_json_and_hash(tmp_path: Path) -> None:
    both = NormalizationStatistics(
        state=statistics(), action=statistics(ROWS[:10]), dataset_fingerprint="ab"
    )
    path = tmp_path / "norm_stats.json"
    path.write_text(both.to_json())
    again = NormalizationStatistics.read(path)
    assert again == both and again.sha256() == both.sha256()
    np.testing.assert_array_equal(again.state.mean, both.state.mean)  # no digit is lost
    other = both.model_copy(update={"dataset_fingerprint": "cd"})
    assert other.sha256() != both.sha256()


def test_what_is_refused() -> None:
    rows = ROWS.copy()
    rows[3, 1] = np.nan
    with pytest.raises(ValidationError, match="mean is not finite"):
        statistics(rows)
    with pytest.raises(ValidationError, match="mean has 3 values for 2 names"):
        FeatureStatistics.from_rows(ROWS, ("x", "y"))
    with pytest.raises(ValidationError, match="count"):
        FeatureStatistics(**(statistics().model_dump() | {"count": 0}))
