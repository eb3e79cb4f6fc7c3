"""A bowl that can be taken on either side is always taken on the same one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from reflexarc.eval.libero.expert_grasp import _rim_grasps

FloatArray = npt.NDArray[np.float64]
NOTHING: FloatArray = np.zeros((0, 3))


def _bowl(middle: FloatArray, turn: float = 0.0) -> FloatArray:
    """Points of an open bowl, 10 cm wide and 5 cm high, on its middle ``(3,)``."""
    angles = np.deg2rad(np.arange(0, 360, 5)) + turn
    rings = [
        np.c_[radius * np.cos(angles), radius * np.sin(angles), np.full(len(angles), height)]
        for radius, height in ((0.03, -0.025), (0.045, 0.0), (0.05, 0.025))
    ]
    return np.concatenate(rings) + middle


def _chosen(points: FloatArray, obstacles: FloatArray) -> FloatArray:
    return min(_rim_grasps(points, obstacles), key=lambda candidate: candidate[0])[1]


@given(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3), st.floats(0.0, 2 * np.pi), st.integers(0, 2**16))
def test_a_free_bowl_is_taken_on_its_left(x: float, y: float, turn: float, seed: int) -> None:
    middle = np.array([x, y, 0.9])
    jitter = np.random.default_rng(seed).normal(0, 1e-4, (216, 3))
    center = _chosen(_bowl(middle, turn) + jitter, NOTHING)
    assert center[1] > middle[1] + 0.03


def test_a_blocked_side_is_left_for_the_other() -> None:
    middle = np.array([0.0, 0.0, 0.9])
    angles = np.deg2rad(np.arange(-20, 200, 1.0))
    wall = np.concatenate(
        [
            np.c_[radius * np.cos(angles), radius * np.sin(angles), np.full(len(angles), height)]
            for radius in (0.08, 0.1)
            for height in np.linspace(0.85, 1.0, 30)
        ]
    )
    assert _chosen(_bowl(middle), NOTHING)[1] > 0.03
    assert _chosen(_bowl(middle), wall)[1] < -0.03
