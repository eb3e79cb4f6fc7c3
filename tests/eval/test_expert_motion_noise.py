"""The mean that a demonstration keeps beside each noisy action."""

from __future__ import annotations

import numpy as np
import pytest

from reflexarc.eval.libero.expert_motion import mean_of_clipped


@pytest.mark.parametrize("deviation", [0.05, 0.15, 0.6])
def test_it_is_the_mean_of_what_is_executed(deviation: float) -> None:
    intended = np.array([-1.0, -0.95, -0.3, 0.0, 0.4, 1.0])
    noise = np.random.default_rng(0).normal(0.0, deviation, (200_000, 6))
    sampled = np.clip(intended + noise, -1, 1).mean(0)
    found = mean_of_clipped(intended, np.full(6, deviation))
    np.testing.assert_allclose(found, sampled, atol=4 * deviation / np.sqrt(len(noise)))
    assert found[0] > -1 and found[-1] < 1  # the limit cuts the noise on one side
