"""The probe's arithmetic on data whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reflexarc.training.probe.collapse import effective_rank, mean_cosine, measure_collapse
from reflexarc.training.probe.picture import principal_plane, progress_colours
from reflexarc.training.probe.ridge import STRENGTHS, fit_ridge
from reflexarc.training.probe.scores import EpisodeSums, interval, resamples

EPISODES = np.repeat(np.arange(20), 15)


def test_ridge_recovers_a_linear_map_on_new_rows() -> None:
    random = np.random.default_rng(0)
    mixing, offset = random.normal(size=(6, 4)), random.normal(size=4)
    x = random.normal(size=(len(EPISODES), 6)) * [1, 10, 0.1, 1, 1, 1] + 5
    fitted = fit_ridge(x, x @ mixing + offset, EPISODES, [3, 1])
    fresh = random.normal(size=(50, 6)) * [1, 10, 0.1, 1, 1, 1] + 5
    np.testing.assert_allclose(fitted.predict(fresh), fresh @ mixing + offset, atol=1e-3)
    assert fitted.strengths == (STRENGTHS[0], STRENGTHS[0])


def test_ridge_is_the_textbook_solution_of_its_strength() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(len(EPISODES), 5))
    y = x[:, :2] + 2 * random.normal(size=(len(EPISODES), 2))
    fitted = fit_ridge(x, y, EPISODES, [1, 1])
    scaled = (x - x.mean(0)) / x.std(0)
    for column in range(2):
        penalty = fitted.strengths[column] * len(x) * np.eye(5)
        weights = np.linalg.solve(
            scaled.T @ scaled + penalty, scaled.T @ (y[:, column] - y[:, column].mean())
        )
        np.testing.assert_allclose(fitted.weights[:, column], weights, atol=1e-9)
    # As many inputs as one likes, constant ones too.
    wide = np.concatenate([x, np.ones((len(x), 3)), random.normal(size=(len(x), 400))], axis=1)
    assert np.isfinite(fit_ridge(wide, y, EPISODES, [1, 1]).predict(wide)).all()


def test_strength_is_chosen_on_episodes_that_were_left_out() -> None:
    """Inputs that only name their episode explain its rows, and nothing about another one."""
    random = np.random.default_rng(2)
    signature = random.normal(size=(20, 30))
    x = signature[EPISODES] + 0.01 * random.normal(size=(len(EPISODES), 30))
    y = random.normal(size=(20, 1))[EPISODES]
    by_episode = fit_ridge(x, y, EPISODES, [1])
    by_row = fit_ridge(x, y, np.arange(len(y)), [1])
    assert by_row.strengths[0] < 1e-3
    assert by_episode.strengths[0] >= 1
    unseen = np.random.default_rng(3).normal(size=(500, 30))
    assert by_episode.predict(unseen).std() < 0.5 * by_row.predict(unseen).std()


def test_one_episode_cannot_be_cross_validated() -> None:
    with pytest.raises(ValueError, match="at least two"):
        fit_ridge(np.eye(3), np.ones((3, 1)), np.zeros(3, dtype=np.int64), [1])


@pytest.mark.parametrize(
    ("spectrum", "wanted"),
    [
        ([1.0, 1.0, 1.0, 1.0], 4.0),
        ([5.0, 0.0, 0.0, 0.0], 1.0),
        ([3.0, 1.0, 0.0, 0.0], math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))),
    ],
)
def test_effective_rank_of_known_spectra(spectrum: list[float], wanted: float) -> None:
    random = np.random.default_rng(4)
    left = np.linalg.qr(random.normal(size=(40, 4)))[0]
    right = np.linalg.qr(random.normal(size=(4, 4)))[0]
    z = left * spectrum @ right
    assert effective_rank(z) == pytest.approx(wanted, abs=1e-6)
    assert effective_rank(z.T) == pytest.approx(wanted, abs=1e-6)


def test_collapse_shows() -> None:
    random = np.random.default_rng(5)
    healthy = measure_collapse(random.normal(size=(2000, 8)))
    assert healthy.rankme > 7.9
    assert healthy.effective_rank > 7.9
    assert abs(healthy.mean_cosine) < 0.02
    assert healthy.std_median == pytest.approx(1, abs=0.1)
    constant = measure_collapse(np.tile(random.normal(size=8), (50, 1)))
    assert constant.rankme == pytest.approx(1)
    assert constant.effective_rank == pytest.approx(1)
    assert constant.mean_cosine == pytest.approx(1)
    assert constant.dead_dimensions == 8
    shifted = measure_collapse(random.normal(size=(2000, 8)) + 100)
    assert shifted.mean_cosine > 0.99
    assert shifted.effective_rank > 7.9
    assert shifted.rankme < 1.5
    half = random.normal(size=(2000, 8)) * [1, 1, 1, 1, 1, 1e-6, 1e-6, 0]
    assert measure_collapse(half).dead_dimensions == 3
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert mean_cosine(opposite) == pytest.approx(-1)


def test_scores_of_known_errors() -> None:
    episodes = np.array([3, 3, 7, 7])
    errors, spread = np.array([1.0, 1, 4, 4]) * 1e-6, np.array([10.0, 10, 10, 10]) * 1e-6
    sums = EpisodeSums.over(errors, spread, episodes, np.array([3, 7]))
    assert sums.r2() == pytest.approx(0.75)
    assert sums.rmse_mm() == pytest.approx(math.sqrt(2.5))
    assert sums.spread_mm() == pytest.approx(math.sqrt(10))
    assert sums.varies()
    only_first, only_second = sums.resampled_r2(np.array([[2.0, 0], [0, 2]]))
    assert (only_first, only_second) == (pytest.approx(0.9), pytest.approx(0.6))
    still = EpisodeSums.over(errors, spread * 0.01, episodes, np.array([3, 7]))
    assert not still.varies()


def test_resamples_keep_every_stratum_whole_and_cover_the_truth() -> None:
    strata = np.array([0, 0, 0, 1, 1, 2])
    weights = resamples(strata, draws=500)
    for stratum, size in ((0, 3), (1, 2), (2, 1)):
        assert (weights[:, strata == stratum].sum(1) == size).all()
    assert len(np.unique(weights, axis=0)) > 10
    # 95 % intervals of a mean over 30 episodes cover it about as often as they say.
    random, covered = np.random.default_rng(6), 0
    for trial in range(200):
        values = random.normal(size=30)
        draws = resamples(np.zeros(30, dtype=np.int64), draws=400, seed=trial)
        found = interval(draws @ values / 30)
        assert found is not None
        covered += found[0] < 0 < found[1]
    assert 0.86 < covered / 200 < 0.99
    assert interval(np.array([np.nan, np.nan, 1.0])) is None


def test_the_plane_of_most_variance() -> None:
    random = np.random.default_rng(7)
    z = random.normal(size=(4000, 5)) * [0.1, 5, 0.1, 2, 0.1]
    points, shares = principal_plane(z)
    np.testing.assert_allclose(shares, [25 / 29.03, 4 / 29.03], atol=0.02)
    assert abs(np.corrcoef(points[:, 0], z[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(points[:, 1], z[:, 3])[0, 1]) > 0.99
    np.testing.assert_array_equal(points, principal_plane(z)[0])
    flat, shares = principal_plane(np.ones((3, 4)))
    assert not flat.any() and not shares.any()
    assert progress_colours(np.array([0.0, 1.0])) == ["#440154", "#fde725"]
